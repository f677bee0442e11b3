"""Posed RGB-D views: of a table that is known, or read from a folder; what is made of them before a fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from stillhouse.config.specs import Spec
from stillhouse.errors import UserError, unknown
from stillhouse.methods.scenes.gaussian_grasper.table import NOTHING, THINGS, Scene, pixel_rays, table
from stillhouse.nn.splatting import Camera
from stillhouse.randomness import generator

KEYS = ("color", "depth", "masks", "features", "camera_to_base", "intrinsics")
SMALLEST_DEPTH = 1e-5
HIGHEST = 70.0  # elevation of a camera, in degrees


class SceneSpec(Spec):
    """What is seen, and from where."""

    name: str = Field("table", description="table (things of known shape), or folder:PATH, one .npz file a view.")
    things: int = Field(6, ge=1, le=len(THINGS), description="On the table.")
    views: int = Field(12, ge=1, description="Views for the fit.")
    test_views: int = Field(6, ge=1, description="Unseen views by which it is judged.")
    size: tuple[int, int] = Field((64, 64), description="Height and width of a view, in pixels.")
    angle: float = Field(36.0, gt=0, lt=180, description="Of view along the longer side, in degrees.")
    radius: float = Field(0.62, gt=0, description="Distance of cameras from the table's middle, in metres.")
    lowest: float = Field(20.0, ge=0, lt=70, description="Elevation of cameras, from this many degrees to 70.")
    border_noise: float = Field(
        0.3, ge=0, le=1, description="Share of pixels whose mask is read up to a pixel away, as segmenters err."
    )
    feature_noise: float = Field(
        0.5,
        ge=0,
        description="Length of what is added to a mask's feature, other in each view.",
    )
    seed: int = Field(0, description="Of the table and the views: one set for all seeds of a run.")
    queries: dict[str, int] = Field(
        default_factory=dict, description="folder: what is asked for, and the mask id that is right in every view."
    )


@dataclass(frozen=True)
class Views:
    """V views of H x W pixels.

    Attributes:
        cameras: of each.
        color: (V, H, W, 3) in [0, 1].
        depth: (V, H, W) along the camera's axis in metres; 0 where nothing is measured.
        normal: (V, H, W, 3) of the world, of length 1; 0 where depth is.
        masks: (V, H, W) ids of masks, as a segmenter has them; -1: none.
        features: (V, K, D) of each mask id, of length 1.
        truth: (V, H, W) the right ids of things, where they are known; else the masks.
    """

    cameras: tuple[Camera, ...]
    color: Tensor
    depth: Tensor
    normal: Tensor
    masks: Tensor
    features: Tensor
    truth: Tensor

    def __len__(self) -> int:
        return len(self.cameras)

    @property
    def valid(self) -> Tensor:
        """(V, H, W) whether there is a measured depth."""
        return self.depth > 0

    def to(self, device: torch.device) -> Views:
        """The same views on a device."""
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "cameras"}
        return Views(tuple(c.to(device) for c in self.cameras), **tensors)

    def targets(self, i: int, pixels: Tensor | None = None) -> Tensor:
        """(H, W, D) the feature of each pixel's mask; 0 where it has none. Or (L, D) of pixels by their numbers, row by
        row."""
        ids = self.masks[i] if pixels is None else self.masks[i].flatten()[pixels]
        return self.features[i][ids.clamp_min(0)] * (ids >= 0)[..., None]

    def halved(self, i: int, times: int) -> Views:
        """View i alone, of every 2 ** times-th pixel in both directions."""
        if not times:
            pick = slice(None), slice(None)
        else:
            k, half = 2**times, 2**times // 2
            small = self.cameras[i].halved(times)
            pick = slice(half, k * small.height, k), slice(half, k * small.width, k)

        def some(x: Tensor) -> Tensor:
            return x[i : i + 1, pick[0], pick[1]]

        return Views(
            (self.cameras[i].halved(times),),
            some(self.color),
            some(self.depth),
            some(self.normal),
            some(self.masks),
            self.features[i : i + 1],
            some(self.truth),
        )


def depth_normals(depth: Tensor, camera_to_base: Tensor, fx: float, fy: float) -> Tensor:
    """Normals (H, W, 3) in the world of a depth map (H, W): (-dz/dx, -dz/dy, 1) of length 1, turned to the world, with
    dz/dx the central difference times fx / z. They point away from the camera."""
    z = torch.where(depth == 0, SMALLEST_DEPTH, depth)
    dv, du = torch.gradient(z)
    flat = torch.stack([-du * fx / z, -dv * fy / z, torch.ones_like(z)], -1)
    return (flat / flat.norm(dim=-1, keepdim=True)) @ camera_to_base[:3, :3].to(flat).T


def back_projected(
    depth: Tensor,
    camera: tuple[float, float, float, float],
    transform: Tensor,
    mask: Tensor | None = None,
    depth_range: tuple[float, float] = (0.001, 1.2),
    heights: tuple[float, float] = (-0.3, -0.1),
    centre: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Points (P, 3) in the world of a depth map's pixels, and which pixels they are, (H, W) bool.

    Args:
        depth: (H, W) in metres.
        camera: fx, fy, cx, cy in pixels.
        transform: (4, 4) camera to world.
        mask: (H, W), 0 where a pixel is left out.
        depth_range: depths that are taken, both ends excluded.
        heights: z in the world that is taken, both ends excluded.
        centre: where in a pixel its ray goes through; the released code takes the corner, 0.
    """
    fx, fy, cx, cy = camera
    rows, columns = torch.meshgrid(*(torch.arange(n).to(depth) + centre for n in depth.shape), indexing="ij")
    local = torch.stack([(columns - cx) * depth / fx, (rows - cy) * depth / fy, depth], -1)
    transform = transform.to(depth)
    world = local @ transform[:3, :3].T + transform[:3, 3]
    kept = (depth > depth_range[0]) & (depth < depth_range[1])
    if mask is not None:
        kept = kept & (mask != 0)
    kept = kept & (world[..., 2] > heights[0]) & (world[..., 2] < heights[1])
    return world[kept], kept


@torch.no_grad()
def looked_at(scene: Scene, cameras: Sequence[Camera]) -> Views:
    """Exact views of a scene, each mask with a feature of length 0."""
    found: list[list[Tensor]] = []
    for camera in cameras:
        shape = (camera.height, camera.width)
        length, normal, ids, color = scene.seen(*pixel_rays(camera))
        there = ids != NOTHING
        found.append(
            [
                color.view(*shape, 3),
                torch.where(there, length, 0).view(shape),
                torch.where(there[:, None], normal, 0).view(*shape, 3),
                ids.view(shape),
            ]
        )
    color, depth, normal, ids = (torch.stack(x) for x in zip(*found))
    return Views(tuple(cameras), color, depth, normal, ids, torch.zeros(len(cameras), len(scene.names), 1), ids)


def as_segmented(views: Views, vectors: Tensor, spec: SceneSpec, which: str) -> Views:
    """Views as an imperfect segmenter and image encoder give them: masks that err at their borders, and for each mask
    the vector (K, D) of its thing and something else, other in each view."""
    draw = generator(spec.seed, "segmenter", which)
    count, height, width = views.masks.shape
    steps = torch.randint(-1, 2, (2, count, height, width), generator=draw)
    steps = steps * (torch.rand(count, height, width, generator=draw) < spec.border_noise)
    rows = (torch.arange(height)[:, None] + steps[0]).clamp(0, height - 1)
    columns = (torch.arange(width) + steps[1]).clamp(0, width - 1)
    masks = torch.where(views.valid, views.truth[torch.arange(count)[:, None, None], rows, columns], NOTHING)
    other = F.normalize(torch.randn(count, *vectors.shape, generator=draw), dim=-1)
    return replace(views, masks=masks, features=F.normalize(vectors + spec.feature_noise * other, dim=-1))


def places(spec: SceneSpec, which: Literal["train", "test"]) -> list[Camera]:
    """Cameras around the table, each somewhere in its own share of the turn, functions of the seed and the word."""
    count = spec.views if which == "train" else spec.test_views
    draw = generator(spec.seed, "views", which)
    turn = 2 * math.pi * (torch.arange(count) + torch.rand(count, generator=draw)) / count
    up = torch.deg2rad(spec.lowest + (HIGHEST - spec.lowest) * torch.rand(count, generator=draw))
    centres = spec.radius * torch.stack([up.cos() * turn.cos(), up.cos() * turn.sin(), up.sin()], -1)
    height, width = spec.size
    return [Camera.at(centre, width, height, spec.angle) for centre in centres]


def known_table(spec: SceneSpec) -> Scene:
    """The table of a spec. Raises `UserError` for a name that is none."""
    if spec.name != "table":
        raise unknown("scene", spec.name, ["table", "folder:PATH"])
    return table(spec.things, spec.seed)


def read_folder(folder: Path) -> Views:
    """Views of a folder, in the order of their files' names: `.npz` with `color` (H, W, 3) uint8, `depth` (H, W) in
    metres, `masks` (H, W) ids from 0 (-1: none), `features` (K, D) of each id, `camera_to_base` (4, 4) of a camera that
    looks along z, and `intrinsics` fx, fy, cx, cy; `normal` (H, W, 3) where it is known better than from depth.

    Raises:
        UserError: no files, an array that is not there, views of several sizes, or depth that is not in metres.
    """
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise UserError(f"scene.name: the folder '{folder}' holds no .npz files, one a view.")
    rows: list[list[Tensor]] = []
    cameras: list[Camera] = []
    for path in paths:
        with np.load(path) as file:
            absent = [k for k in KEYS if k not in file.files]
            if absent:
                raise UserError(f"scene.name: '{path}' lacks the array '{absent[0]}'; a view has {', '.join(KEYS)}.")
            given = {k: torch.from_numpy(np.asarray(file[k])) for k in (*KEYS, "normal") if k in file.files}
        depth, to_base = given["depth"].float(), given["camera_to_base"].float()
        if float(depth.max()) > 20:
            raise UserError(f"scene.name: depth in '{path}' is up to {float(depth.max()):.4g}; give it in metres.")
        fx, fy, cx, cy = given["intrinsics"].double().tolist()
        cameras.append(Camera(torch.linalg.inv(to_base), fx, fy, cx, cy, depth.shape[1], depth.shape[0]))
        normal = given.get("normal")
        # towards the camera, as surfaces that are seen face it
        normal = -depth_normals(depth, to_base, fx, fy) if normal is None else F.normalize(normal.float(), dim=-1)
        there = depth > 0
        row = [given["color"].float() / 255, depth, normal * there[..., None]]
        rows.append([*row, given["masks"].long(), F.normalize(given["features"].float(), dim=-1)])
    if len({tuple(r[1].shape) for r in rows}) > 1 or len({tuple(r[4].shape) for r in rows}) > 1:
        raise UserError(f"scene.name: the views in '{folder}' are not of one size, or have not equally many masks.")
    color, depth, normal, masks, features = (torch.stack(x) for x in zip(*rows))
    if int(masks.max()) >= features.shape[1]:
        raise UserError(f"scene.name: a mask in '{folder}' has the id {int(masks.max())}, but features end before it.")
    return Views(tuple(cameras), color, depth, normal, masks, features, masks)


def split(views: Views, test: int) -> tuple[Views, Views]:
    """Views for the fit and unseen ones, which are spread evenly. Raises `UserError` where none would be left."""
    if test >= len(views):
        raise UserError(f"scene.test_views: {test} of {len(views)} views would leave none for the fit.")
    chosen = set(torch.linspace(0, len(views) - 1, test).round().long().tolist())
    return _some(views, [i for i in range(len(views)) if i not in chosen]), _some(views, sorted(chosen))


def _some(views: Views, which: Sequence[int]) -> Views:
    tensors = {f.name: getattr(views, f.name)[list(which)] for f in fields(views) if f.name != "cameras"}
    return Views(tuple(views.cameras[i] for i in which), **tensors)
