"""Gaussian splatting: ellipsoids in space are projected to a camera and composited front to back.

Kerbl et al., SIGGRAPH 2023 (arXiv 2308.04079), with the projection of Zwicker et al. (EWA, 2002). An image is cut into
square tiles; a Gaussian is looked at by the tiles that it reaches, and tiles with about as many Gaussians are computed
together. So the work grows with the number of pairs of a tile and a Gaussian: linearly in Gaussians of a given size in
the image, and linearly in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stillhouse.functional.precision import full_precision
from stillhouse.nn.rays import looking_at_origin

BLUR = 0.3  # square pixels, added to both axes of a projected Gaussian
HIGHEST, LOWEST, STOP = 0.999, 1 / 255, 1e-4
NEAREST = 0.01
MARGIN = 1.3  # of the half image beyond which the projection's slope no longer grows
TILE = 8
ELEMENTS = 1 << 23  # of tile pixels by Gaussians that are computed together


@dataclass(frozen=True)
class Camera:
    """A pinhole camera. `view` (4, 4) takes world to camera (x right, y down, z forward); lengths in pixels, and the
    first pixel's centre lies at (0.5, 0.5)."""

    view: Tensor
    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int

    @property
    def centre(self) -> Tensor:
        """(3,) where it stands."""
        return -self.view[:3, :3].T @ self.view[:3, 3]

    @property
    def to_world(self) -> Tensor:
        """(4, 4) camera to world."""
        rotation = self.view[:3, :3].T
        out = torch.eye(4, dtype=self.view.dtype, device=self.view.device)
        out[:3, :3], out[:3, 3] = rotation, -rotation @ self.view[:3, 3]
        return out

    def to(self, device: torch.device) -> Camera:
        """The same camera, its matrix on a device."""
        return replace(self, view=self.view.to(device))

    def enlarged(self, times: int) -> Camera:
        """The same view of `times` as many pixels along each side."""
        k = times
        return Camera(self.view, k * self.fx, k * self.fy, k * self.cx, k * self.cy, k * self.width, k * self.height)

    def halved(self, times: int = 1) -> Camera:
        """The same view of fewer pixels, each side divided by 2 ** times and rounded down."""
        k = 2**times
        width, height = max(1, self.width // k), max(1, self.height // k)
        a, b = width / self.width, height / self.height
        return Camera(self.view, self.fx * a, self.fy * b, self.cx * a, self.cy * b, width, height)

    @staticmethod
    def at(place: Tensor, width: int, height: int, view_degrees: float) -> Camera:
        """A camera at `place` (3,) that looks at the origin with z up; the angle of view is that of the longer side."""
        turned = looking_at_origin(place[None])[0] * torch.tensor([1.0, -1.0, -1.0])  # columns right, down, forward
        view = torch.eye(4)
        view[:3, :3], view[:3, 3] = turned.T, -turned.T @ place
        focal = 0.5 * max(width, height) / math.tan(0.5 * math.radians(view_degrees))
        return Camera(view, focal, focal, width / 2, height / 2, width, height)


@dataclass(slots=True)
class Projected:
    """N Gaussians in an image: `uv` (N, 2) their centres in pixels, `cov` (N, 2, 2), `depth` (N,) along the axis."""

    uv: Tensor
    cov: Tensor
    depth: Tensor


@dataclass(slots=True)
class Splatted:
    """What a camera sees: `image` (H, W, C) over nothing, and `transmittance` (H, W), the share that passes it."""

    image: Tensor
    transmittance: Tensor


def rotations(quaternions: Tensor) -> Tensor:
    """(N, 4) w, x, y, z of any length -> (N, 3, 3)."""
    w, x, y, z = (quaternions / quaternions.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def quaternion(rotation: Tensor) -> Tensor:
    """(3, 3) -> (4,) w, x, y, z of length 1."""
    import numpy as np
    from scipy.spatial.transform import Rotation

    x, y, z, w = Rotation.from_matrix(rotation.detach().cpu().double().numpy()).as_quat()
    return torch.from_numpy(np.array([w, x, y, z])).to(rotation)


def multiplied(a: Tensor, b: Tensor) -> Tensor:
    """Products of quaternions, (4,) or (N, 4) each."""
    w, x, y, z = a.unbind(-1)
    p, q, r, s = b.unbind(-1)
    parts = [
        *(w * p - x * q - y * r - z * s, w * q + x * p + y * s - z * r),
        *(w * r - x * s + y * p + z * q, w * s + x * r - y * q + z * p),
    ]
    return torch.stack(parts, -1)


@full_precision
def project(means: Tensor, log_scales: Tensor, quaternions: Tensor, camera: Camera, blur: float = BLUR) -> Projected:
    """Gaussians in a camera's image: means (N, 3), log_scales (N, 3), quaternions (N, 4)."""
    view = camera.view.to(means)
    turn = view[:3, :3]
    x, y, z = (means @ turn.T + view[:3, 3]).unbind(-1)
    ahead = torch.where(z > NEAREST, z, torch.ones_like(z))  # the others are left out later
    reach_x, reach_y = MARGIN * camera.width / (2 * camera.fx), MARGIN * camera.height / (2 * camera.fy)
    tx, ty = ahead * (x / ahead).clamp(-reach_x, reach_x), ahead * (y / ahead).clamp(-reach_y, reach_y)
    zero = torch.zeros_like(ahead)
    slope = torch.stack(
        [
            torch.stack([camera.fx / ahead, zero, -camera.fx * tx / ahead**2], -1),
            torch.stack([zero, camera.fy / ahead, -camera.fy * ty / ahead**2], -1),
        ],
        -2,
    )
    half = slope @ turn @ (rotations(quaternions) * log_scales.exp()[:, None, :])  # (N, 2, 3)
    cov = half @ half.transpose(1, 2) + blur * torch.eye(2, dtype=means.dtype, device=means.device)
    uv = torch.stack([camera.fx * x / ahead + camera.cx, camera.fy * y / ahead + camera.cy], -1)
    return Projected(uv, cov, z)


def reach(found: Projected, opacity: Tensor) -> Tensor:
    """(N, 2) how far from its centre, in pixels along x and y, a Gaussian is opaque enough to count; 0: nowhere."""
    squared = 2 * (opacity / LOWEST).clamp_min(1).log()
    variances = torch.diagonal(found.cov, dim1=1, dim2=2)
    there = (found.depth > NEAREST) & (opacity >= LOWEST)
    return (squared[:, None] * variances).sqrt() * there[:, None]


@dataclass(slots=True)
class _Pairs:
    """Pairs of a tile and a Gaussian, by tile and then by depth: `gaussian` (M,), and of tile t the pairs from
    `start[t]` on, `count[t]` of them."""

    gaussian: Tensor
    start: Tensor
    count: Tensor


@torch.no_grad()
def _pairs(found: Projected, opacity: Tensor, tiles: tuple[int, int], tile: int) -> _Pairs:
    """The host must know how many pairs there are, so it waits for the device once."""
    across, down = tiles
    far = reach(found, opacity) * 1.001 + 1e-3
    order = found.depth.argsort(stable=True)
    uv, far = found.uv[order], far[order]
    ends = torch.tensor([across, down], device=uv.device) - 1
    low, high = ((uv - far) / tile).floor(), ((uv + far) / tile).floor()
    seen = (far > 1e-3).all(-1) & (high >= 0).all(-1) & (low <= ends).all(-1)
    low, high = (torch.minimum(v.clamp_min(0), ends.to(v)).long() for v in (low, high))
    wide, tall = (high - low + 1).unbind(-1)
    each = wide * tall * seen
    which = torch.repeat_interleave(torch.arange(len(order), device=uv.device), each)
    within = torch.arange(len(which), device=uv.device) - (each.cumsum(0) - each)[which]
    x, y = low[which, 0] + within % wide[which], low[which, 1] + within // wide[which]
    place = y * across + x
    by_tile = place.argsort(stable=True)
    count = torch.bincount(place, minlength=across * down)
    return _Pairs(order[which[by_tile]], count.cumsum(0) - count, count)


def _groups(count: Tensor, pixels: int) -> list[tuple[Tensor, int]]:
    """Tiles with about as many Gaussians, and the most that one of them has."""
    numbers = count.tolist()
    groups: dict[int, list[int]] = {}
    for t, number in enumerate(numbers):
        if number:
            groups.setdefault((number - 1).bit_length(), []).append(t)
    out = []
    for members in groups.values():
        most = max(numbers[t] for t in members)
        some = max(1, ELEMENTS // (most * pixels))
        out += [(torch.tensor(members[i : i + some]), most) for i in range(0, len(members), some)]
    return out


class _Composited(torch.autograd.Function):
    """Gaussians of tiles composited at the tiles' pixels; backward with as many passes over the pairs as forward.

    In: `quadratic` (T, K, 6) the coefficients of each Gaussian's exponent over the basis, `opacity` (T, K), `channels`
    (T, K, C), front to back, and the basis (P, 6) of pixels. Out: image (T, P, C) and what light is left (T, P).
    """

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, Tensor]:
        quadratic, opacity, channels, basis = given
        alpha = (quadratic @ basis.T).exp_().mul_(opacity[..., None])
        free = (alpha >= LOWEST) & (alpha <= HIGHEST)
        alpha = torch.where(alpha < LOWEST, 0, alpha).clamp_(max=HIGHEST)
        passed = torch.log1p(-alpha)
        total = passed.cumsum(1)
        seen = total > math.log(STOP)
        left = (passed * seen).sum(1).exp()
        before = (total - passed).exp_()
        ctx.save_for_backward(opacity, channels, basis, alpha, before, seen, free & seen, left)
        return (alpha * before).mul_(seen).transpose(1, 2) @ channels, left

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_image, of_left = gradients
        opacity, channels, basis, alpha, before, seen, free, left = ctx.saved_tensors
        weight = (alpha * before).mul_(seen)
        of_weight = channels @ of_image.transpose(1, 2)
        shown = weight * of_weight
        behind = shown.sum(1, keepdim=True) - shown.cumsum(1) + (left * of_left)[:, None]
        of_exponent = (before * of_weight).sub_(behind / (1 - alpha)).mul_(alpha).mul_(free)
        of_opacity = of_exponent.sum(-1) / opacity.clamp_min(LOWEST)
        return of_exponent @ basis, of_opacity, weight @ of_image, None


@full_precision
def splat(found: Projected, opacity: Tensor, channels: Tensor, width: int, height: int, tile: int = TILE) -> Splatted:
    """Gaussians composited front to back.

    alpha = min(0.999, opacity exp(-1/2 d^T cov^-1 d)) at a pixel's centre; one below 1/255 is left out, and a pixel is
    done before the one that would leave less than 1e-4 of its light. The weight of a Gaussian is alpha times the light
    that is left.

    Args:
        found: where they are; those nearer than 0.01 are left out.
        opacity: (N,) in [0, 1].
        channels: (N, C) what each shows.
        tile: pixels a side.

    Returns:
        `image` (height, width, C) over 0.
    """
    across, down = -(-width // tile), -(-height // tile)
    pairs = _pairs(found, opacity, (across, down), tile)
    inverse = torch.linalg.inv(found.cov)
    conic = torch.stack([inverse[:, 0, 0], inverse[:, 0, 1], inverse[:, 1, 1]], -1)
    grid = torch.arange(tile, device=opacity.device) + 0.5 - tile / 2
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    basis = torch.stack([x * x, y * y, x * y, x, y, torch.ones_like(x)], -1).flatten(0, 1).to(opacity)
    image = channels.new_zeros(across * down, tile * tile, channels.shape[1])
    left = channels.new_ones(across * down, tile * tile)
    groups = _groups(pairs.count, tile * tile)
    done: list[tuple[Tensor, Tensor, Tensor]] = []
    for members, most in groups:
        members = members.to(opacity.device)
        rank = torch.arange(most, device=opacity.device)
        there = rank < pairs.count[members][:, None]
        at = pairs.gaussian[(pairs.start[members][:, None] + rank).clamp_max(len(pairs.gaussian) - 1)]
        middle = torch.stack([members % across, members // across], -1) * tile + tile / 2
        u, v = (found.uv[at] - middle[:, None].to(found.uv)).unbind(-1)
        a, b, c = conic[at].unbind(-1)
        # -1/2 a (x - u)^2 - 1/2 c (y - v)^2 - b (x - u) (y - v), over the basis
        parts = [-a / 2, -c / 2, -b, a * u + b * v, b * u + c * v, -(a * u * u + c * v * v) / 2 - b * u * v]
        colors, passes = _Composited.apply(torch.stack(parts, -1), opacity[at] * there, channels[at], basis)
        done.append((members, colors, passes))
    if done:  # at once, as each copy is of the whole image
        which, colors, passes = (torch.cat(parts) for parts in zip(*done))
        image, left = image.index_copy(0, which, colors), left.index_copy(0, which, passes)
    else:  # nothing is seen, with a gradient of 0
        image = image + 0 * (channels.sum() + found.uv.sum() + opacity.sum())
    return Splatted(*(_untiled(x, across, down, tile)[:height, :width] for x in (image, left)))


def _untiled(tiles: Tensor, across: int, down: int, tile: int) -> Tensor:
    """(tiles, pixels, …) -> (rows, columns, …)."""
    rest = tiles.shape[2:]
    return tiles.view(down, across, tile, tile, *rest).transpose(1, 2).reshape(down * tile, across * tile, *rest)
