"""Feature maps of any network in one form: (B, C, H, W), of one size for student and teacher, or pooled to (B, C).

Maps of signals have their channels second, whatever the network: the reader of its taps has moved them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.signals import Signals

LAST_STAGES = ["stage:-3", "stage:-2", "stage:-1"]
"""The stages that the multi-stage classics use: all of a CIFAR network, the last three of four elsewhere."""

PREFIXES = (0, 1, 2, 5)
"""Tokens before the patches: none, a class token, a second for distillation, or a class token and four registers."""


@dataclass(frozen=True)
class Grid:
    """How tokens lie in an image: `prefix` tokens first, then height x width patches, row by row."""

    prefix: int
    height: int
    width: int


@cache
def grid_of(length: int, image: tuple[int, int] | None = None) -> Grid | None:
    """The grid of `length` tokens of an image (H, W); None where there is none. Where the image is not known, the grid
    is a square.

    A patch of p x p pixels divides the image, else the rows and columns at its edges are padded, else they are left
    out.

    >>> grid_of(197), grid_of(2700, image=(180, 240)), grid_of(576, image=(256, 576))
    (Grid(prefix=1, height=14, width=14), Grid(prefix=0, height=45, width=60), Grid(prefix=0, height=16, width=36))
    """
    if image is None:
        sides = {prefix: math.isqrt(length - prefix) for prefix in PREFIXES if prefix < length}
        return next((Grid(prefix, side, side) for prefix, side in sides.items() if side**2 == length - prefix), None)
    height, width = image
    sizes = range(1, max(image) + 1)
    divided = [(height // p, width // p) for p in sizes if height % p == width % p == 0]
    padded, cut = [(-(-height // p), -(-width // p)) for p in sizes], [(height // p, width // p) for p in sizes]
    for grids in (divided, padded, cut):
        for prefix in PREFIXES:
            for h, w in grids:
                if h * w == length - prefix > 0:
                    return Grid(prefix, h, w)
    return None


def as_map(x: Tensor, image: tuple[int, int] | None = None) -> Tensor:
    """A feature as a map (B, C, H, W).

    A map stays as it is. Tokens (B, L, D) fold to a map (B, D, h, w) without the tokens before the patches. A vector
    (B, D) is a map of one pixel.

    Args:
        image: (H, W) of the images that the network saw; without it, tokens are of a square grid.

    Raises:
        UserError: tokens that make no grid, or another number of axes.
    """
    if x.ndim == 4:
        return x
    if x.ndim == 2:
        return x[:, :, None, None]
    if x.ndim == 3:
        rows, length, width = x.shape
        grid = grid_of(length, image)
        if grid is not None:
            return x[:, grid.prefix :].transpose(1, 2).reshape(rows, width, grid.height, grid.width)
    of = "a square grid" if image is None else f"a grid of patches of an image of {image[0]} x {image[1]} pixels"
    raise UserError(
        f"A feature of shape {tuple(x.shape)} cannot be read as a map (B, C, H, W): give a map, or tokens (B, L, D) "
        f"of {of}."
    )


def pooled(x: Tensor, image: tuple[int, int] | None = None) -> Tensor:
    """A feature as a vector (B, C): the mean of a map over space, a vector as it is, of tokens (B, L, D) the class
    token, the first.

    Tokens of an image that fill a grid have no class token: they are averaged.
    """
    if x.ndim == 4:
        return x.mean(dim=(2, 3))
    if x.ndim == 3:
        grid = None if image is None else grid_of(x.shape[1], image)
        return x[:, 0] if grid is None or grid.prefix else x.mean(1)
    if x.ndim == 2:
        return x
    raise UserError(
        f"A feature of shape {tuple(x.shape)} cannot be pooled; give a map (B, C, H, W), tokens (B, L, D) or a vector "
        "(B, C)."
    )


def map_tap(signals: Signals, layer: str) -> Tensor:
    """The tap on a layer as a map (B, C, H, W); see `as_map`."""
    return as_map(signals.require(f"tap:{layer}"), signals.image)


def pooled_tap(signals: Signals, layer: str) -> Tensor:
    """The tap on a layer as a vector (B, C); see `pooled`."""
    return pooled(signals.require(f"tap:{layer}"), signals.image)


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both features as maps, averaged (adaptive pooling) to the smaller height and the smaller width."""
    student, teacher = as_map(student), as_map(teacher)
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return tuple(x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (student, teacher))  # type: ignore[return-value]
