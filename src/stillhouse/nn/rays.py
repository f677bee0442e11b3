"""Cameras, rays, samples along them, and what is seen: volume rendering by the quadrature of Max (1995), as NeRF uses
it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RAYS_AT_ONCE = 4096
"""Of a view that is rendered whole."""


@dataclass(slots=True)
class Rays:
    """R rays: `origins` (R, 3) and `directions` (R, 3) of length 1."""

    origins: Tensor
    directions: Tensor

    def split(self, count: int) -> list[Rays]:
        """The same rays, at most `count` at a time."""
        return [Rays(o, d) for o, d in zip(self.origins.split(count), self.directions.split(count))]


@dataclass(slots=True)
class Seen:
    """What R rays see: `image` (R, 3), `weights_sum` (R,) the opacity, `depth_sum` (R,) the weighted sum of depths."""

    image: Tensor
    weights_sum: Tensor
    depth_sum: Tensor


def looking_at_origin(centres: Tensor) -> Tensor:
    """Camera-to-world rotations (B, 3, 3) of cameras at (B, 3): columns right, up, back; z is up in the world."""
    back = centres / centres.norm(dim=-1, keepdim=True)
    up = torch.tensor([0.0, 0.0, 1.0], device=centres.device).expand_as(back)
    right = torch.linalg.cross(up, back)
    flat = right.norm(dim=-1, keepdim=True) < 1e-4  # straight above or below
    right = torch.where(flat, torch.tensor([1.0, 0.0, 0.0], device=centres.device).expand_as(right), right)
    right = right / right.norm(dim=-1, keepdim=True)
    return torch.stack([right, torch.linalg.cross(back, right), back], -1)


def on_sphere(
    count: int, radius: float, generator: torch.Generator, lowest: float = -10, highest: float = 80
) -> Tensor:
    """(count, 3) camera centres at random: azimuth uniform, elevation uniform in degrees."""
    azimuth = 2 * math.pi * torch.rand(count, generator=generator)
    elevation = torch.deg2rad(lowest + (highest - lowest) * torch.rand(count, generator=generator))
    flat = elevation.cos()
    return radius * torch.stack([flat * azimuth.cos(), flat * azimuth.sin(), elevation.sin()], -1)


def camera_rays(centre: Tensor, side: int, view_degrees: float, pixels: Tensor | None = None) -> Rays:
    """Rays through the pixels' centres of a square image by a camera at `centre` (3,) that looks at the origin.

    Args:
        pixels: (R,) numbers of pixels, row by row; None: all.
    """
    numbers = torch.arange(side * side, device=centre.device) if pixels is None else pixels
    focal = 0.5 * side / math.tan(0.5 * math.radians(view_degrees))
    x = (numbers % side + 0.5 - side / 2) / focal
    y = -(numbers // side + 0.5 - side / 2) / focal
    local = torch.stack([x, y, -torch.ones_like(x)], -1)
    directions = local @ looking_at_origin(centre[None])[0].T
    return Rays(centre.expand(len(numbers), 3), directions / directions.norm(dim=-1, keepdim=True))


def in_box(rays: Rays, bound: float, nearest: float = 0.2) -> tuple[Tensor, Tensor]:
    """Where rays enter and leave [-bound, bound]^3: (R,) and (R,); equal where they miss it."""
    slopes = torch.where(rays.directions.abs() < 1e-9, torch.full_like(rays.directions, 1e-9), rays.directions)
    ends = torch.stack([(-bound - rays.origins) / slopes, (bound - rays.origins) / slopes])
    near, far = ends.amin(0).amax(-1).clamp_min(nearest), ends.amax(0).amin(-1)
    return near, torch.maximum(near, far)


def sampled(rays: Rays, bound: float, steps: int, offsets: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Points along rays through the box: (R, S, 3), their depths (R, S) and step lengths (R, S).

    Args:
        offsets: (R, S) in [0, 1), where each lies in its step; None: in the middle.
    """
    near, far = in_box(rays, bound)
    delta = (far - near)[:, None].expand(-1, steps) / steps
    within = torch.full_like(delta, 0.5) if offsets is None else offsets
    depths = near[:, None] + (torch.arange(steps, device=near.device) + within) * delta
    return rays.origins[:, None] + depths[..., None] * rays.directions[:, None], depths, delta


def composite(density: Tensor, color: Tensor, delta: Tensor, background: Tensor, depths: Tensor | None = None) -> Seen:
    """Colours of rays from their samples.

    w_i = (1 - exp(-sigma_i delta_i)) prod_{j<i} exp(-sigma_j delta_j); the image is sum_i w_i c_i + (1 - sum_i w_i) bg.

    Args:
        density: (R, S).
        color: (R, S, 3).
        delta: (R, S) step lengths.
        background: (R, 3) or (3,).
        depths: (R, S); None: the running sums of the step lengths.
    """
    thickness = density * delta
    passed = torch.exp(-torch.cumsum(thickness, 1) + thickness)
    weights = -torch.expm1(-thickness) * passed
    opacity = weights.sum(1)
    depths = torch.cumsum(delta, 1) if depths is None else depths
    image = (weights[..., None] * color).sum(1) + (1 - opacity)[:, None] * background
    return Seen(image, opacity, (weights * depths).sum(1))
