"""Which patches of a frame are read."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError

Mode = Literal["random", "uniform", "centre", "exact_centre", "motion", "residual", "merge", "resolution"]


def kept_count(patches: int, drop: float, training: bool = False) -> int:
    """How many patches are read where a share `drop` of them is not: rounded down in training, to the nearest (a half
    to the even one) otherwise; one at least.

    >>> kept_count(64, 0.85), kept_count(64, 0.85, training=True), kept_count(4, 0.95)
    (10, 9, 1)
    """
    share = patches * (1 - drop)
    return max(1, math.floor(share) if training else round(share))


def random_patches(noise: Tensor, count: int) -> Tensor:
    """(B, count): the patches of the largest noise (B, P)."""
    return noise.topk(count, dim=1).indices


def uniform_patches(patches: int, count: int) -> Tensor:
    """(count,): equally far from each other."""
    return torch.linspace(0, patches - 1, count).long()


def centre_patches(side: int, count: int, exact: bool = False) -> Tensor:
    """(count,): the nearest to the centre of a grid, in raster order.

    Args:
        side: patches a side.
        exact: as the distance is; else as in the released code, whose rows are divided without rounding, so that what
            is kept lies somewhat above the centre.
    """
    index = torch.arange(side * side)
    row = torch.div(index, side, rounding_mode="floor") if exact else index / side
    middle = (side - 1) / 2
    distance = (row - middle) ** 2 + (index % side - middle) ** 2
    return distance.argsort(stable=True)[:count].sort().values


def moving_patches(change: Tensor, patch: int, count: int, noise: Tensor | None = None) -> Tensor:
    """(B, count): the patches in which the most changes, most first.

    Args:
        change: (B, H, W) of each pixel: how far it moved, or how much it differs from the frame before.
        patch: pixels a side.
        count: how many.
        noise: (B, P) small numbers that break ties, as in a frame that stands still.
    """
    total = F.avg_pool2d(change[:, None].float(), patch).flatten(1) * patch**2
    return (total if noise is None else total + noise).topk(count, dim=1).indices


def square_grid(patches: int) -> int:
    """Patches a side. Raises `UserError` where the grid is not square."""
    side = math.isqrt(patches)
    if side * side != patches:
        raise UserError(f"residualvit: a centre needs a square grid of patches; this one has {patches}.")
    return side


def take(tokens: Tensor, kept: Tensor) -> Tensor:
    """The class token and the kept patches (B, K) of tokens (B, 1 + P, W): (B, 1 + K, W)."""
    kept = kept if kept.ndim == 2 else kept.expand(len(tokens), -1)
    at = (kept + 1)[..., None].expand(-1, -1, tokens.shape[-1])
    return torch.cat([tokens[:, :1], tokens.gather(1, at)], 1)
