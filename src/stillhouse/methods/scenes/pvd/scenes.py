"""Scenes that are known at every point, and their views: two balls and a box, and the bodies of FAUST."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from stillhouse.config.specs import Spec
from stillhouse.data.source import existing
from stillhouse.errors import UserError, unknown
from stillhouse.nn.rays import RAYS_AT_ONCE, Rays, camera_rays, composite, on_sphere, sampled
from stillhouse.randomness import generator

Volume = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Points (M, 3) and directions (M, 3) -> density (M,) and colour (M, 3)."""
DENSEST = 60.0
FINE_STEPS = 192
CELLS = 64  # a side of the volume that a body is read from
SHELL = 0.03  # half the thickness of a body's surface


class SceneSpec(Spec):
    """What is seen, and from where."""

    name: str = Field("shapes", description="shapes (two balls and a box), or faust:NAME, such as faust:tr_reg_080.")
    root: str | None = Field(None, description="Folder that holds the data; default: as of other data.")
    views: int = Field(24, ge=1, description="Views for training from images.")
    test_views: int = Field(8, ge=1, description="Unseen views by which fields are judged.")
    side: int = Field(40, ge=4, description="Pixels a side of a view.")
    angle: float = Field(40.0, gt=0, lt=180, description="Of view, in degrees.")
    radius: float = Field(3.2, gt=0, description="Distance of cameras from the middle, in half sides of the box.")
    seed: int = Field(0, description="Of the views: one set for all seeds of a run.")


@dataclass(frozen=True)
class Views:
    """V views of a scene: `centres` (V, 3) of the cameras, and `pixels` (V, side * side, 4): colour times opacity, and
    opacity."""

    centres: Tensor
    pixels: Tensor
    side: int
    angle: float

    def rays(self, view: int) -> Rays:
        """All rays of a view."""
        return camera_rays(self.centres[view], self.side, self.angle)

    def to(self, device: torch.device) -> Views:
        """The same views on a device."""
        return Views(self.centres.to(device), self.pixels.to(device), self.side, self.angle)

    def on(self, background: float) -> Tensor:
        """(V, side * side, 3) the views over a grey of this level."""
        return self.pixels[..., :3] + (1 - self.pixels[..., 3:]) * background


def scene(spec: SceneSpec, root: Path) -> Volume:
    """The volume of a scene. Raises `UserError` for a name that is none."""
    kind, _, which = spec.name.partition(":")
    if kind == "shapes" and not which:
        return shapes
    if kind == "faust" and which:
        return body(existing(f"faust/{which}.npz", root))
    raise unknown("scene", spec.name, ["shapes", "faust:tr_reg_080"])


def shapes(x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Two balls and a box with stripes and checks, and a gloss that depends on the direction."""
    first, second = torch.tensor([-0.35, -0.3, 0.1]), torch.tensor([0.4, 0.25, -0.15])
    middle, half = torch.tensor([0.1, -0.35, -0.45]), torch.tensor([0.45, 0.2, 0.2])
    first, second, middle, half = (v.to(x) for v in (first, second, middle, half))
    distances = torch.stack(
        [(x - first).norm(dim=-1) - 0.35, (x - second).norm(dim=-1) - 0.3, ((x - middle).abs() - half).amax(-1)]
    )
    nearest, which = distances.min(0)
    density = DENSEST * torch.sigmoid(-nearest / 0.01)
    stripes = 0.5 + 0.5 * torch.sin(14 * x[:, 2])
    checks = (torch.sin(9 * x[:, 0]) * torch.sin(9 * x[:, 1]) > 0).to(x)
    gloss = 0.25 * (directions[:, 0] * 0.6 - directions[:, 2] * 0.8).clamp_min(0) ** 4
    ball = torch.stack([0.9 * stripes, 0.25 + 0.2 * stripes, torch.full_like(stripes, 0.2)], -1)
    other = torch.stack([torch.full_like(checks, 0.15), 0.3 + 0.5 * checks, torch.full_like(checks, 0.75)], -1)
    box = torch.stack([0.7 + 0.2 * checks, 0.65 * torch.ones_like(checks), 0.2 + 0.5 * stripes], -1)
    color = torch.stack([ball, other, box])[which, torch.arange(len(x), device=x.device)]
    return density, (color + gloss[:, None]).clamp(0, 1)


def body(path: Path) -> Volume:
    """A mesh as a thin shell, coloured by its vertices' places, read from a volume of distances to its vertices."""
    from scipy.spatial import cKDTree

    with np.load(path) as file:
        if "vertices" not in file.files:
            raise UserError(f"'{path}' holds no array `vertices`, so it is no body of FAUST.")
        vertices = file["vertices"].astype(np.float64)
    low, high = vertices.min(0), vertices.max(0)
    vertices = (vertices - (low + high) / 2) / ((high - low).max() / 2) * 0.9
    axis = np.linspace(-1, 1, CELLS)
    places = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    distance, nearest = cKDTree(vertices).query(places)
    color = 0.5 + 0.4 * np.sin(6 * vertices[nearest] + np.array([0.0, 2.0, 4.0]))
    grid = np.concatenate([distance[:, None], color], 1).reshape(CELLS, CELLS, CELLS, 4)
    volume = torch.from_numpy(grid).float().permute(3, 2, 1, 0)[None]  # by z, y, x, as grid_sample reads it

    def read(x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        found = F.grid_sample(volume.to(x), x.view(1, 1, -1, 1, 3), align_corners=True).view(4, -1)
        return DENSEST * torch.sigmoid((SHELL - found[0]) / 0.006), found[1:].T.clamp(0, 1)

    return read


@torch.no_grad()
def rendered(volume: Volume, spec: SceneSpec, count: int, which: Literal["train", "test"]) -> Views:
    """Views of a scene, from places that a seed and the word say, by many fine steps."""
    centres = on_sphere(count, spec.radius, generator(spec.seed, "views", which))
    views = []
    for centre in centres:
        parts = []
        for rays in camera_rays(centre, spec.side, spec.angle).split(RAYS_AT_ONCE):
            points, _, delta = sampled(rays, 1.0, FINE_STEPS)
            seen = rays.directions[:, None].expand_as(points).reshape(-1, 3)
            density, color = volume(points.reshape(-1, 3), seen)
            found = composite(density.view(delta.shape), color.view(points.shape), delta, torch.zeros(3))
            parts.append(torch.cat([found.image, found.weights_sum[:, None]], -1))
        views.append(torch.cat(parts))
    return Views(centres, torch.stack(views), spec.side, spec.angle)


def banded_centre(radius: float) -> Tensor:
    """(3,) a camera's place as the released code draws it: azimuth even, elevation more often low than high, in bands
    of five degrees that end at 0 to 79; from torch's generator."""
    bands = torch.arange(80)
    upper = bands[torch.multinomial(((90 - bands) // 15 + 1).double(), 1)]
    lower = (upper - 5).clamp_min(0)
    elevation = torch.deg2rad(lower + (upper - lower) * torch.rand(1))
    azimuth = 2 * math.pi * torch.rand(1)
    flat = elevation.cos()
    return radius * torch.cat([flat * azimuth.cos(), flat * azimuth.sin(), elevation.sin()])
