"""`GaussianScene`: Gaussians to keep, which render views, find what a text asks for, and choose a grasp of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import ModelSpec, Spec
from stillhouse.data.source import find_root
from stillhouse.errors import UserError
from stillhouse.files import atomic_write
from stillhouse.methods.scenes.gaussian_grasper.gaussians import Gaussians, Seen, lifting
from stillhouse.methods.scenes.gaussian_grasper.grasping import Grasps, GraspSpec, choose, propose
from stillhouse.methods.scenes.gaussian_grasper.query import largest_part, relevancy, text_vectors
from stillhouse.methods.scenes.gaussian_grasper.views import back_projected
from stillhouse.nn.splatting import Camera
from stillhouse.randomness import generator
from stillhouse.runs.products import Product, read_meta

WEIGHTS = "gaussians.safetensors"
ORBIT = 12  # views of an export
SOLID = 0.9  # opacity of a pixel that is a point of a surface
ROWS = 16384  # pixels whose features are lifted at once


class QuerySpec(Spec):
    """How a text is looked for."""

    temperature: float = Field(10.0, gt=0, description="Of the relevancy.")
    threshold: float = Field(0.6, ge=0, lt=1, description="Relevancy beyond which a point is found.")
    radius: float = Field(0.02, gt=0, description="Points of one thing lie within this of another, in metres.")
    detail: int = Field(2, ge=1, description="Pixels, along each side of one of a view's, that surfaces are read from.")
    sharp: float = Field(
        0.01, gt=0, description="Spread of a pixel's depth up to which it shows one surface, in metres."
    )
    grain: float = Field(0.003, gt=0, description="Cubes of this side, in metres, hold one point of a surface each.")
    solid: float = Field(0.5, ge=0, lt=1, description="Opacity of a pixel from which it can be found.")


@dataclass
class Found:
    """A thing that a text asked for: `points` (P, 3) of its surface and their outward `normals` (P, 3)."""

    points: Tensor
    normals: Tensor


@dataclass
class Samples:
    """Pixels as points (M, 3) with normals (M, 3) towards their camera and features (M, width)."""

    points: Tensor
    normals: Tensor
    features: Tensor


@dataclass
class GaussianScene(Product):
    """The product of GaussianGrasper.

    Attributes:
        gaussians: of the scene.
        lift: takes their features to the space of texts.
        hidden: widths of its hidden layers.
        canonical: (C, D) the phrases that a query is compared with.
        known: vectors (D,) of texts that need no encoder.
        language: the text encoder; None: texts have random vectors.
        query: how a text is looked for.
        flip: whether normals are turned to the camera.
        cameras: (V, 4, 4) world to camera of the views of its fit, and `intrinsics` fx, fy, cx, cy, width, height.
        radius: how far an orbit is from the middle.
        figures: of its making; saved with the run, not with the product.
    """

    kind: ClassVar[str] = "stillhouse.methods.scenes.gaussian_grasper:GaussianScene"
    formats: ClassVar[Mapping[str, str]] = {"ply": "gaussians.ply", "views": "views", "safetensors": WEIGHTS}
    gaussians: Gaussians
    lift: nn.Sequential
    hidden: list[int]
    canonical: Tensor
    known: dict[str, Tensor]
    language: ModelSpec | None
    query: QuerySpec
    flip: bool
    cameras: Tensor
    intrinsics: list[float]
    radius: float
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def views(self) -> list[Camera]:
        """The cameras of its fit."""
        fx, fy, cx, cy, width, height = self.intrinsics
        return [Camera(view, fx, fy, cx, cy, int(width), int(height)) for view in self.cameras]

    @torch.no_grad()
    def seen(self, camera: Camera) -> Seen:
        """What a camera sees: colour, depth, normals, features."""
        return self.gaussians.seen(camera, flip=self.flip)

    def look(self, camera: Camera) -> Tensor:
        """(3, H, W) uint8: the view of a camera."""
        return (self.seen(camera).color.clamp(0, 1) * 255).round().to(torch.uint8).movedim(-1, 0)

    def vector(self, text: str) -> Tensor:
        """(D,) of a text, by the encoder where it is not known."""
        if text in self.known:
            return self.known[text]
        return text_vectors([text], self.language, find_root(None, None), self.canonical.shape[1])[0]

    @torch.no_grad()
    def relevant(self, features: Tensor, text: str) -> Tensor:
        """(...) the relevancy of features (..., width), rendered or of Gaussians, for a text."""
        device = features.device
        vector, canonical = self.vector(text).to(device), self.canonical.to(device)
        return relevancy(self.lift(features), vector, canonical, self.query.temperature)

    def mask(self, seen: Seen, text: str) -> Tensor:
        """(H, W) bool: where a text is seen."""
        return (self.relevant(seen.features, text) > self.query.threshold) & (seen.alpha > self.query.solid)

    @torch.no_grad()
    def gaussians_of(self, text: str) -> Tensor:
        """(N,) bool: the Gaussians of the thing that a text asks for."""
        out = self.relevant(self.gaussians.features, text) > self.query.threshold
        places = out.nonzero()[:, 0]
        part = largest_part(self.gaussians.means[places], self.query.radius).to(out.device)
        return torch.zeros_like(out).index_put((places[part],), torch.ones_like(places[part], dtype=torch.bool))

    @torch.no_grad()
    def samples(self, cameras: Sequence[Camera] | None = None) -> Samples:
        """Pixels that show one solid surface, of views, those of its fit by default. On the CPU."""
        rows: list[tuple[Tensor, Tensor, Tensor]] = []
        for camera in cameras or self.views:
            camera = camera.enlarged(self.query.detail).to(self.gaussians.means.device)
            seen = self.seen(camera)
            where = (seen.alpha > SOLID) & (seen.spread < self.query.sharp)
            intrinsics = (camera.fx, camera.fy, camera.cx, camera.cy)
            wide = (-math.inf, math.inf)
            world, kept = back_projected(seen.depth, intrinsics, camera.to_world, where, (0.0, math.inf), wide)
            rows.append((world.cpu(), F.normalize(seen.normal[kept], dim=-1).cpu(), seen.features[kept].cpu()))
        return Samples(*(torch.cat(parts) for parts in zip(*rows)))

    @torch.no_grad()
    def surface(self, text: str | None = None, samples: Samples | None = None) -> Found:
        """Points of surfaces where a text is seen, or of everything, from rendered depth and normals.

        Args:
            samples: what `samples` gives, for several texts.

        Raises:
            UserError: nothing is found.
        """
        given = samples or self.samples()
        if text is None:
            return _thinned(given.points, given.normals, self.query.grain)
        device = self.gaussians.means.device
        relevant = [self.relevant(x.to(device), text).cpu() for x in given.features.split(ROWS)]
        where = torch.cat(relevant) > self.query.threshold if relevant else torch.zeros(0, dtype=torch.bool)
        if not bool(where.any()):
            raise UserError(f"Nothing in the scene answers to '{text}'; lower query.threshold, or ask otherwise.")
        found = _thinned(given.points[where], given.normals[where], self.query.grain)
        part = largest_part(found.points, self.query.radius)
        return Found(found.points[part], found.normals[part])

    def grasp(self, text: str, spec: GraspSpec | None = None, seed: int = 0) -> dict[str, Any]:
        """The grasp of the thing that a text asks for: `centre`, `approach`, `axis`, `width`, `score`, and how many
        candidates fell for which reason.

        Raises:
            UserError: nothing is found, or no candidate is feasible.
        """
        spec = spec or GraspSpec()
        samples = self.samples()
        found, everything = self.surface(text, samples), self.surface(samples=samples)
        grasps = propose(found.points, spec, generator(seed, "grasps", text))
        choice = choose(grasps, found.points, found.normals, everything.points, spec)
        chosen = {name: getattr(grasps, name)[choice.index].tolist() for name in Grasps.__dataclass_fields__}
        return {**chosen, "reasons": choice.reasons}

    def tensors(self) -> dict[str, Tensor]:
        """All arrays, by name."""
        out = {f"gaussians.{k}": v for k, v in self.gaussians.state_dict().items()}
        out |= {f"lift.{k}": v for k, v in self.lift.state_dict().items()}
        out |= {"canonical": self.canonical, "cameras": self.cameras}
        out |= {f"known.{i}": v for i, v in enumerate(self.known.values())}
        return {k: v.detach().cpu().contiguous().clone() for k, v in out.items()}

    def _write_weights(self, path: Path) -> None:
        from safetensors.torch import save_file

        with atomic_write(path) as temporary:
            save_file(self.tensors(), str(temporary))

    def save(self, folder: Path) -> None:
        self._write_weights(folder / WEIGHTS)
        meta = {
            "kind": self.kind,
            "format": 1,
            "hidden": self.hidden,
            "known": list(self.known),
            "language": None if self.language is None else self.language.model_dump(mode="json"),
            "query": self.query.model_dump(),
            "flip": self.flip,
            "intrinsics": self.intrinsics,
            "radius": self.radius,
        }
        (folder / "product.json").write_text(json.dumps(meta, indent=1))

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> GaussianScene:
        from safetensors.torch import load_file

        meta, tensors = read_meta(folder), load_file(str(Path(folder) / WEIGHTS))
        count, harmonics = tensors["gaussians.harmonics"].shape[:2]
        width, canonical = tensors["gaussians.features"].shape[1], tensors["canonical"]
        gaussians = Gaussians(count, int(harmonics**0.5) - 1, width)
        gaussians.load_state_dict(_under(tensors, "gaussians."))
        lift = lifting(width, meta["hidden"], canonical.shape[1])
        lift.load_state_dict(_under(tensors, "lift."))
        language = None if meta["language"] is None else ModelSpec.model_validate(meta["language"])
        return cls(
            gaussians.eval().requires_grad_(False),
            lift.eval().requires_grad_(False),
            meta["hidden"],
            canonical,
            {text: tensors[f"known.{i}"] for i, text in enumerate(meta["known"])},
            language,
            QuerySpec.model_validate(meta["query"]),
            meta["flip"],
            tensors["cameras"],
            meta["intrinsics"],
            meta["radius"],
        )

    def export(self, to: str, path: Path) -> list[str]:
        """`ply`: Gaussians as viewers of splats read them, without features; `views`: a turn around the scene as PNG
        files; `safetensors`: all arrays."""
        if to == "safetensors":
            self._write_weights(path)
            return [f"Wrote {path}"]
        if to == "ply":
            write_ply(self.gaussians, path)
            return [f"Wrote {len(self.gaussians)} Gaussians to {path}"]
        from torchvision.io import write_png

        path.mkdir(parents=True, exist_ok=True)
        _, _, _, _, width, height = self.intrinsics
        focal = self.intrinsics[0]
        angle = math.degrees(2 * math.atan(0.5 * max(width, height) / focal))
        for i in range(ORBIT):
            turn, up = 2 * math.pi * i / ORBIT, math.radians(40)
            centre = [math.cos(up) * math.cos(turn), math.cos(up) * math.sin(turn), math.sin(up)]
            camera = Camera.at(self.radius * torch.tensor(centre), 4 * int(width), 4 * int(height), angle)
            write_png(self.look(camera), str(path / f"{i:02d}.png"))
        return [f"Wrote {ORBIT} views of a turn around the scene to {path}"]


def _thinned(points: Tensor, normals: Tensor, side: float) -> Found:
    """The mean of points (P, 3) in each cube that holds any, and the direction of their mean normal."""
    cells, which = (points / side).floor().long().unique(dim=0, return_inverse=True)
    count = torch.bincount(which, minlength=len(cells))[:, None]
    mean, normal = (torch.zeros(len(cells), 3).index_add_(0, which, x) / count for x in (points, normals))
    return Found(mean, F.normalize(normal, dim=-1))


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def write_ply(gaussians: Gaussians, path: Path) -> None:
    """Gaussians as a binary PLY file with the properties that viewers of splats read."""
    state = {k: v.detach().cpu().float() for k, v in gaussians.state_dict().items()}
    rest = state["harmonics"][:, 1:].transpose(1, 2).flatten(1)
    columns = [state["means"], torch.zeros_like(state["means"]), state["harmonics"][:, 0], rest]
    columns += [state["opacity"][:, None], state["log_scales"], F.normalize(state["quats"], dim=-1)]
    names = ["x", "y", "z", "nx", "ny", "nz", *(f"f_dc_{i}" for i in range(3))]
    names += [f"f_rest_{i}" for i in range(rest.shape[1])]
    names += ["opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rest)}"]
    header += [*(f"property float {name}" for name in names), "end_header", ""]
    with atomic_write(path) as temporary:
        body = torch.cat(columns, 1).numpy().astype(np.float32).tobytes()
        Path(temporary).write_bytes("\n".join(header).encode() + body)
