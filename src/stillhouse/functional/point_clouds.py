"""Points in pillars and voxels, neighbours in a space of features, with shapes that do not depend on the data.

Clouds are (B, N, F): x, y, z in metres, then what else a sensor gives. A row outside of the range counts for nothing,
so that short clouds are padded with rows at `NOWHERE`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NOWHERE = -1e4
"""Coordinates of rows that pad a cloud, in metres."""


@dataclass
class Voxels:
    """Points by voxel; of a pillar, a voxel as high as the range.

    Attributes:
        points: (B, N, F), voxel by voxel.
        slots: (B, N) the slot of each point's voxel, 0 to P - 1; P where the point is dropped.
        counts: (B, P) points of each slot; 0: an empty slot.
        cells: (B, P) the place in the grid, z * H * W + y * W + x; D * H * W for an empty slot.
        shape: (D, H, W) of the grid.
    """

    points: Tensor
    slots: Tensor
    counts: Tensor
    cells: Tensor
    shape: tuple[int, int, int]

    @property
    def valid(self) -> Tensor:
        """(B, N) whether a point is in a voxel."""
        return self.slots < self.counts.shape[1]


def grid_shape(low: Sequence[float], high: Sequence[float], size: Sequence[float]) -> tuple[int, int, int]:
    """(D, H, W) of a grid over a range: how many voxels of `size` lie along z, y and x.

    >>> grid_shape((0, -39.68, -3), (69.12, 39.68, 1), (0.16, 0.16, 4))
    (1, 496, 432)
    """
    width, height, depth = (round((b - a) / s) for a, b, s in zip(low, high, size))
    return depth, height, width


def inside(points: Tensor, low: Sequence[float], high: Sequence[float]) -> Tensor:
    """(B, N) whether a point (B, N, F) lies in the range from low to high, x, y, z."""
    xyz = points[..., :3]
    return ((xyz >= xyz.new_tensor(low)) & (xyz < xyz.new_tensor(high))).all(-1)


def voxelised(
    points: Tensor, low: Sequence[float], high: Sequence[float], size: Sequence[float], most_points: int, slots: int
) -> Voxels:
    """Points by voxel: at most `most_points` of each, the first; at most P = `slots` voxels of a cloud, the fullest.

    Slots are in the order of their cells, and depend on the points alone: networks that are given the same cloud have
    the same voxel in the same slot.

    Args:
        points: (B, N, F).
        low, high: the range, x, y, z in metres.
        size: of a voxel, x, y, z in metres.
    """
    number = points.shape[1]
    depth, height, width = grid_shape(low, high, size)
    cells, slots = depth * height * width, min(slots, number)
    steps = ((points[..., :3] - points.new_tensor(low)) / points.new_tensor(size)).floor().long()
    edges = torch.tensor([width, height, depth], device=points.device) - 1
    x, y, z = torch.minimum(steps.clamp_min(0), edges).unbind(-1)
    flat = torch.where(inside(points, low, high), (z * height + y) * width + x, cells)
    flat, order = flat.sort(dim=1, stable=True)
    points = points.gather(1, order[..., None].expand_as(points))
    first = torch.ones_like(flat, dtype=torch.bool)
    first[:, 1:] = flat[:, 1:] != flat[:, :-1]
    group = first.long().cumsum(1) - 1
    places = torch.arange(number, device=points.device).expand_as(flat)
    rank = places - torch.where(first, places, 0).cummax(1).values
    kept = (flat < cells) & (rank < most_points)
    counts = torch.zeros_like(flat).scatter_add(1, group, kept.long())
    chosen = counts.topk(slots, dim=1).indices.sort(dim=1).values  # the fullest, in the order of their cells
    slot_of = torch.full_like(flat, slots).scatter(
        1, chosen, torch.arange(slots, device=points.device).expand_as(chosen)
    )
    slot = torch.where(kept, slot_of.gather(1, group), slots)
    counts = counts.gather(1, chosen)
    cell_of = torch.full_like(flat, cells).scatter_reduce(1, group, flat, "amin")
    cell = torch.where(counts > 0, cell_of.gather(1, chosen), cells)
    return Voxels(points, slot, counts, cell, (depth, height, width))


def pooled(values: Tensor, voxels: Voxels, how: str) -> Tensor:
    """(B, P, C) of values (B, N, C) of points: their "sum", or the largest ("amax") of values that are not negative."""
    slots = voxels.counts.shape[1]
    out = values.new_zeros(len(values), slots + 1, values.shape[2])
    index = voxels.slots[..., None].expand_as(values)
    return out.scatter_reduce(1, index, values, how)[:, :slots]


def on_grid(values: Tensor, voxels: Voxels) -> Tensor:
    """(B, C, D, H, W) of values (B, P, C) of slots; 0 where there is no voxel."""
    cells = math.prod(voxels.shape)
    out = values.new_zeros(len(values), cells + 1, values.shape[2])
    out = out.scatter(1, voxels.cells[..., None].expand_as(values), values)[:, :cells]
    return out.transpose(1, 2).unflatten(2, voxels.shape)


def nearest_rows(queries: Tensor, rows: Tensor, number: int, valid: Tensor | None = None, chunk: int = 1024) -> Tensor:
    """(G, N, K) indices of the rows nearest to each query, nearest first, some queries at a time: of a group, no more
    than chunk x n distances are in memory.

    Args:
        queries: (G, N, C).
        rows: (G, n, C).
        number: K, at most n.
        valid: (G, n) which rows may be neighbours; the others come last.
        chunk: queries at a time.
    """
    lengths = rows.square().sum(-1)
    if valid is not None:
        lengths = lengths.masked_fill(~valid, torch.inf)
    found = [
        (lengths[:, None] - 2 * part @ rows.mT).topk(number, dim=-1, largest=False).indices  # |q|^2 ranks nothing
        for part in queries.split(chunk, dim=1)
    ]
    return torch.cat(found, 1)


def farthest_points(xyz: Tensor, number: int, valid: Tensor) -> Tensor:
    """(B, number) indices of points that are far from each other: each is the farthest from those before it. The first
    is the first valid one; without further valid points, some occur again.

    Args:
        xyz: (B, N, 3).
        valid: (B, N) which may be chosen.
    """
    last = valid.long().argmax(1)
    distance = torch.where(valid, torch.inf, -1.0).to(xyz.dtype)
    chosen = []
    for _ in range(number):
        chosen.append(last)
        away = (xyz - xyz.gather(1, last[:, None, None].expand(-1, 1, 3))).square().sum(-1)
        distance = torch.where(valid, torch.minimum(distance, away), distance)
        last = distance.argmax(1)
    return torch.stack(chosen, 1)


def rows_at(values: Tensor, index: Tensor) -> Tensor:
    """values (B, n, C) at index (B, ...) -> (B, ..., C)."""
    flat = index.flatten(1)
    return values.gather(1, flat[..., None].expand(-1, -1, values.shape[2])).unflatten(1, index.shape[1:])
