"""Views of bodies with their depth, from known cameras: what is learned from, and pairs by which points are judged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stillhouse.config.specs import Spec
from stillhouse.data.mesh_views import Camera, View, camera_around, seen
from stillhouse.data.meshes import Mesh, named_mesh
from stillhouse.errors import UserError
from stillhouse.randomness import key

Arrays = dict[str, Tensor]
LEAST = 6  # points that both images of a test pair show


class ViewsSpec(Spec):
    """What is seen."""

    source: str = Field(
        "faust", description="A folder of meshes with a correspondence to one template; or ellipsoids, made up."
    )
    root: str | None = Field(None, description="Folder that holds it; default: as of other data.")
    train: list[str] = Field(description="Meshes that are learned from.", min_length=2)
    test: list[str] = Field(description="Meshes that are judged on.", min_length=2)
    side: int = Field(96, ge=8, description="Pixels a side.")
    train_views: int = Field(12, ge=2, description="Views of each mesh: a sequence, for the refinement.")
    test_views: int = Field(3, ge=1)
    turn: float = Field(180.0, gt=0, le=180, description="Cameras' azimuth, in degrees to either side of the front.")
    pairs: int = Field(100, ge=1, description="Test pairs, each of two bodies seen from at most 90 degrees apart.")
    points: int = Field(64, ge=LEAST, description="Vertices of the template that are looked for.")
    seed: int = Field(0, description="Of the views: one set for all seeds of a run.")


@dataclass
class Pictures:
    """N images of bodies on a device.

    Attributes:
        images: (N, 3, S, S) uint8.
        depth: (N, S, S) float32; 0 where nothing is.
        rotation: (N, 3, 3), translation: (N, 3), focal: (N,), of the cameras, as of `Camera`.
        body: (N,) which mesh.
        points: (N, P, 2) row and column of the template's points, in pixels.
        visible: (N, P) bool.
        azimuth: (N,) degrees.
    """

    images: Tensor
    depth: Tensor
    rotation: Tensor
    translation: Tensor
    focal: Tensor
    body: Tensor
    points: Tensor
    visible: Tensor
    azimuth: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def side(self) -> int:
        """S."""
        return self.images.shape[-1]

    def to(self, device: torch.device) -> Pictures:
        """The same on a device."""
        return Pictures(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def arrays(self) -> Arrays:
        """All tensors by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def bodies(spec: ViewsSpec, root: Path, train: bool) -> dict[str, Mesh]:
    """The training or the test meshes by name."""
    return {name: named_mesh(spec.source, name, root) for name in (spec.train if train else spec.test)}


def rendered(spec: ViewsSpec, meshes: dict[str, Mesh], train: bool) -> Pictures:
    """All views of these meshes."""
    count = spec.train_views if train else spec.test_views
    rows: dict[str, list[np.ndarray]] = {name: [] for name in Pictures.__dataclass_fields__}
    for number, (name, mesh) in enumerate(meshes.items()):
        if mesh.correspondence is None:
            raise UserError(f"The mesh '{name}' has no array `correspondence`, so its points have no names.")
        chosen = np.linspace(0, len(mesh.correspondence) - 1, spec.points).astype(np.int64)
        places = mesh.vertices[mesh.correspondence[chosen]]
        draw = np.random.default_rng(key("views", spec.seed, name))
        texture, normals = _texture(mesh, draw), mesh.normals()
        for _ in range(count):
            for field, value in _one(mesh, places, (texture, normals), spec, draw).items():
                rows[field].append(value)
            rows["body"].append(np.array(number))
    made = {name: torch.from_numpy(np.stack(values)) for name, values in rows.items()}
    return Pictures(**{k: v.float() if v.dtype == torch.float64 else v for k, v in made.items()})


def _texture(mesh: Mesh, draw: np.random.Generator) -> np.ndarray:
    """(V, 3) colours of a body's own: one colour with a few slow waves, which say nothing of other bodies."""
    base, waves = draw.uniform(0.25, 0.85, 3), draw.normal(size=(3, 3)) * 6
    phases = draw.uniform(0, 2 * np.pi, 3)
    return (base + 0.15 * np.sin(mesh.vertices @ waves + phases)).clip(0.02, 0.98)


def _one(
    mesh: Mesh, places: np.ndarray, skin: tuple[np.ndarray, np.ndarray], spec: ViewsSpec, draw: np.random.Generator
) -> dict[str, np.ndarray]:
    """A view from a random place under a random light, before a random ground; `skin` is colours and normals (V, 3)."""
    texture, normals = skin
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    azimuth, elevation = draw.uniform(-spec.turn, spec.turn), draw.uniform(-10, 30)
    distance = draw.uniform(1.2, 1.5) * float(np.linalg.norm(high - low))
    camera = camera_around((low + high) / 2 + draw.normal(size=3) * 0.03, distance, azimuth, elevation, 36.0, spec.side)
    view = seen(mesh, camera)
    light = -camera.rotation[2] + draw.normal(size=3) * 0.7
    shade = 0.35 + 0.65 * (normals @ (light / np.linalg.norm(light))).clip(0, 1)
    body = view.interpolated(mesh, texture * shade[:, None])
    across = np.linspace(-1, 1, spec.side)
    ground = draw.uniform(0.1, 0.9, 3) + 0.2 * (draw.normal() * across[:, None] + draw.normal() * across)[..., None]
    image = np.where(view.covered[..., None], body, ground) + 0.02 * draw.normal(size=(spec.side, spec.side, 3))
    points, visible = _visible(places, camera, view)
    return {
        "images": (image.clip(0, 1) * 255).round().astype(np.uint8).transpose(2, 0, 1),
        "depth": view.depth.astype(np.float32),
        "rotation": camera.rotation,
        "translation": camera.translation,
        "focal": np.array(camera.focal),
        "points": points,
        "visible": visible,
        "azimuth": np.array(azimuth),
    }


def _visible(places: np.ndarray, camera: Camera, view: View, slack: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    """(P, 2) where points are in the picture, and (P,) whether nothing is before them."""
    row, column, depth = camera.projected(places).T
    at = np.floor(np.stack([row, column], 1)).astype(np.int64)
    inside = ((at >= 0) & (at < [camera.height, camera.width])).all(1)
    at = at.clip(0, [camera.height - 1, camera.width - 1])
    there = view.depth[at[:, 0], at[:, 1]]
    return np.stack([row, column], 1) - 0.5, inside & (there > 0) & (np.abs(there - depth) < slack)


def test_pairs(pictures: Pictures, spec: ViewsSpec) -> Tensor:
    """(at most `pairs`, 2) images of two bodies, from at most 90 degrees apart, that show some common points.

    Raises:
        UserError: there is no such pair.
    """
    draw = np.random.default_rng(key("pairs", spec.seed))
    body, azimuth, visible = (getattr(pictures, k).numpy() for k in ("body", "azimuth", "visible"))
    apart = np.abs((azimuth[:, None] - azimuth + 180) % 360 - 180)
    common = visible.astype(np.int64) @ visible.T.astype(np.int64)
    good = np.argwhere((body[:, None] != body) & (apart <= 90) & (common >= LEAST))
    if not len(good):
        raise UserError(f"No two test views show {LEAST} common points of two bodies; render more (views.test_views).")
    return torch.from_numpy(good[np.sort(draw.permutation(len(good))[: spec.pairs])])


def reach_of(depth: Tensor) -> Tensor:
    """(N,) the longer side, in pixels, of the boxes around what depth maps (N, S, S) show."""
    there = depth > 0
    rows, columns = there.any(2).float().sum(1), there.any(1).float().sum(1)
    return torch.maximum(rows, columns)


def matched_pixels(pictures: Pictures, one: Tensor, two: Tensor, count: int, tolerance: float) -> tuple[Tensor, ...]:
    """Points of images `one` (B,) that are the same places in images `two` (B,) of the same body, by depth and cameras:
    (B, count, 2) rows and columns in both, and (B, count) bool, which are inside of `two` and visible there.

    Points are drawn by torch's generator. A point of one is lifted by its depth, seen by the other camera, and counts
    where the depth that this sees is the point's, within `tolerance`.
    """
    side, depth = pictures.side, pictures.depth[one].flatten(1)
    index = torch.multinomial((depth > 0).float() + 1e-9, count, replacement=True)
    at = torch.stack([index // side, index % side], -1)
    z, focal, half = depth.gather(1, index), pictures.focal[one][:, None], side / 2
    row, column = at[..., 0] + 0.5 - half, at[..., 1] + 0.5 - half
    before = torch.stack([column * z / focal, row * z / focal, z], -1)
    world = (before - pictures.translation[one][:, None]) @ pictures.rotation[one]
    there = world @ pictures.rotation[two].transpose(1, 2) + pictures.translation[two][:, None]
    far = there[..., 2].clamp_min(1e-6)
    other = pictures.focal[two][:, None]
    place = torch.stack([other * there[..., 1] / far + half, other * there[..., 0] / far + half], -1)
    whole = place.floor().long()
    inside = ((whole >= 0) & (whole < side)).all(-1)
    whole = whole.clamp(0, side - 1)
    found = pictures.depth[two].flatten(1).gather(1, whole[..., 0] * side + whole[..., 1])
    seen_there = inside & (z > 0) & (found > 0) & ((found - there[..., 2]).abs() < tolerance)
    return at.float(), place - 0.5, seen_there
