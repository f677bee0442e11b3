"""Boxes in space that stand upright and are turned: (x, y, z of the centre, length, width, height, yaw), in metres and
radians; length lies along x at yaw 0, and yaw turns from x to y."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-9


def bev_corners(boxes: Tensor) -> Tensor:
    """(..., 4, 2) corners of boxes (..., 7) as seen from above, anticlockwise."""
    half = boxes[..., None, 3:5] / 2
    signs = boxes.new_tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    x, y = (half * signs).unbind(-1)
    cos, sin = boxes[..., 6, None].cos(), boxes[..., 6, None].sin()
    return torch.stack([cos * x - sin * y, sin * x + cos * y], -1) + boxes[..., None, :2]


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def shared_area(first: Tensor, second: Tensor) -> Tensor:
    """(...,) the area that convex quadrilaterals (..., 4, 2) and (..., 4, 2) share; corners anticlockwise.

    The corners of the shared polygon are corners of one inside the other, and crossings of sides; put in order around
    their middle, the area is that of the polygon.
    """
    first, second = torch.broadcast_tensors(first, second)
    middle = first.mean(-2, keepdim=True)
    a, b = first - middle, second - middle  # near the origin, where rounding is least
    side_a, side_b = a.roll(-1, -2) - a, b.roll(-1, -2) - b

    def within(points: Tensor, corners: Tensor, sides: Tensor) -> Tensor:
        out = _cross(sides[..., None, :, :], points[..., :, None, :] - corners[..., None, :, :])
        return (out >= -EPS).all(-1)

    between = b[..., None, :, :] - a[..., :, None, :]
    turn = _cross(side_a[..., :, None, :], side_b[..., None, :, :])
    safe = torch.where(turn.abs() > EPS, turn, torch.ones_like(turn))
    along_a = _cross(between, side_b[..., None, :, :]) / safe
    along_b = _cross(between, side_a[..., :, None, :]) / safe
    hit = (turn.abs() > EPS) & (along_a >= 0) & (along_a <= 1) & (along_b >= 0) & (along_b <= 1)
    crossing = a[..., :, None, :] + along_a[..., None] * side_a[..., :, None, :]
    points = torch.cat([a, b, crossing.flatten(-3, -2)], -2)
    real = torch.cat([within(a, b, side_b), within(b, a, side_a), hit.flatten(-2)], -1)
    number = real.sum(-1, keepdim=True)
    centre = torch.where(real[..., None], points, 0).sum(-2, keepdim=True) / number.clamp_min(1)[..., None]
    points = points - centre
    angle = torch.atan2(points[..., 1], points[..., 0]).masked_fill(~real, torch.inf)
    order = angle.argsort(-1)
    points = points.gather(-2, order[..., None].expand_as(points))
    last = torch.arange(points.shape[-2], device=points.device) >= number
    points = torch.where(last[..., None], points[..., :1, :], points)  # what is no corner repeats the first
    area = _cross(points, points.roll(-1, -2)).sum(-1) / 2
    return torch.where(number[..., 0] > 2, area, 0).clamp_min(0)


def overlaps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union of boxes (..., 7) and (..., 7), which broadcast: seen from above, and in space."""
    first, second = torch.broadcast_tensors(first, second)
    shared = shared_area(bev_corners(first), bev_corners(second))
    area_a, area_b = first[..., 3] * first[..., 4], second[..., 3] * second[..., 4]
    top = torch.minimum(first[..., 2] + first[..., 5] / 2, second[..., 2] + second[..., 5] / 2)
    bottom = torch.maximum(first[..., 2] - first[..., 5] / 2, second[..., 2] - second[..., 5] / 2)
    volume = shared * (top - bottom).clamp_min(0)
    above = shared / (area_a + area_b - shared).clamp_min(EPS)
    return above, volume / (area_a * first[..., 5] + area_b * second[..., 5] - volume).clamp_min(EPS)


def pairwise_overlaps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(..., N, M) of boxes (..., N, 7) with boxes (..., M, 7), as `overlaps`."""
    return overlaps(first[..., :, None, :], second[..., None, :, :])
