"""Differentiable Siamese augmentation (Zhao and Bilen, ICML 2021, arXiv 2102.08259): drawn once, applied to as many
batches as one likes.

`one_of` and `all_of` draw, from torch generators; `apply` is a pure function of images and the random numbers, with
gradient in the images. A draw of count 1
is the same for every image (Siamese: real and synthetic batches see it alike); a draw of count B has a row an image.
Draws are tuples: `a + b` is a, then b.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError, unknown

Draws = tuple[tuple[str, tuple[Tensor, ...]], ...]
"""Operations in order, each with its parameters: tensors of (count,) or (1,)."""

GROUPS: dict[str, tuple[str, ...]] = {
    "color": ("brightness", "saturation", "contrast"),
    "crop": ("crop",),
    "cutout": ("cutout",),
    "flip": ("flip",),
    "scale": ("scale",),
    "rotate": ("rotate",),
    "resized_crop": ("resized_crop",),
}
"""What a strategy may name, and its operations in order."""


@dataclass(frozen=True)
class Strength:
    """How far each operation goes; the defaults are those of the published code.

    Attributes:
        brightness, saturation, contrast: widths of their ranges.
        crop, cutout: of the image's side: the largest shift, the side of the square.
        flip: probability of mirroring.
        scale: the largest factor, and its inverse the smallest.
        rotate: degrees to either side.
        area: the smallest share of the image that a resized crop keeps.
    """

    brightness: float = 1.0
    saturation: float = 2.0
    contrast: float = 0.5
    crop: float = 0.125
    cutout: float = 0.5
    flip: float = 0.5
    scale: float = 1.2
    rotate: float = 15.0
    area: float = 0.08


def groups_of(strategy: str | Sequence[str]) -> tuple[str, ...]:
    """The groups of a strategy such as `color_crop_cutout_flip_scale_rotate`; an empty one has none. Raises `UserError`
    for a group that does not exist."""
    names = strategy if not isinstance(strategy, str) else _split(strategy)
    for name in names:
        if name not in GROUPS:
            raise unknown("augmentation group", name, GROUPS)
    return tuple(names)


def one_of(
    groups: Sequence[str],
    count: int,
    size: tuple[int, int],
    generators: torch.Generator | Iterable[torch.Generator],
    strength: Strength = Strength(),
) -> Draws:
    """One of the groups, at random, with its operations' parameters for `count` images of that (H, W). No groups:
    nothing.

    Args:
        generators: a generator on the CPU, or one for each further draw (the first chooses the group).
    """
    if not groups:
        return ()
    stream = _stream(generators)
    chosen = groups[int(torch.randint(0, len(groups), (1,), generator=next(stream)))]
    return all_of([chosen], count, size, stream, strength)


def all_of(
    groups: Sequence[str],
    count: int,
    size: tuple[int, int],
    generators: torch.Generator | Iterable[torch.Generator],
    strength: Strength = Strength(),
) -> Draws:
    """Every group, in order. Arguments as of `one_of`."""
    stream = _stream(generators)
    ops = [op for group in groups_of(groups) for op in GROUPS[group]]
    return tuple((op, parameters(op, raw(op, count, size, stream, strength), size, strength)) for op in ops)


def apply(x: Tensor, draws: Draws, align_corners: bool = True) -> Tensor:
    """Images (B, C, H, W) as the draws say.

    Args:
        draws: of count 1 or B.
        align_corners: of the grids of `scale` and `rotate`; the published code has True.

    Raises:
        UserError: integer images, or draws of another count.
    """
    if not x.is_floating_point():
        raise UserError(
            f"Augmentation with gradients needs floating-point images; given: {x.dtype}. Divide uint8 images by 255 "
            "first."
        )
    for op, numbers in draws:
        if len(numbers[0]) not in (1, len(x)):
            raise UserError(f"The augmentation was sampled for {len(numbers[0])} images, but the batch holds {len(x)}.")
        values = [v.to(x.device, non_blocking=True) for v in numbers]
        x = OPERATIONS[op](x, *values, align_corners) if op in ("scale", "rotate") else OPERATIONS[op](x, *values)
    return x


# ---- random numbers --------------------------------------------------------------------------------------------------


def raw(
    op: str, count: int, size: tuple[int, int], stream: Iterator[torch.Generator], strength: Strength = Strength()
) -> tuple[Tensor, ...]:
    """The numbers (count,) that an operation draws, in order: uniform in [0, 1), or integers for `crop` (shifts) and
    `cutout` (offsets)."""
    if op == "crop":
        ranges = [(-_share(side, strength.crop), _share(side, strength.crop) + 1) for side in size]
    elif op == "cutout":
        ranges = [(0, side + 1 - _share(side, strength.cutout) % 2) for side in size]
    else:
        draws = {"scale": 2, "resized_crop": 4}.get(op, 1)
        return tuple(torch.rand(count, generator=next(stream)) for _ in range(draws))
    return tuple(torch.randint(low, high, (count,), generator=next(stream)) for low, high in ranges)


def parameters(
    op: str, numbers: tuple[Tensor, ...], size: tuple[int, int], strength: Strength = Strength()
) -> tuple[Tensor, ...]:
    """What an operation takes, from the raw draws (count,)."""
    first = numbers[0]
    if op == "brightness":
        return ((first - 0.5) * strength.brightness,)
    if op == "saturation":
        return (first * strength.saturation,)
    if op == "contrast":
        return (first + strength.contrast,)
    if op == "flip":
        return (first < strength.flip,)
    if op == "scale":
        return tuple(u * (strength.scale - 1 / strength.scale) + 1 / strength.scale for u in numbers)
    if op == "rotate":
        return ((first - 0.5) * 2 * strength.rotate / 180 * math.pi,)
    if op == "cutout":
        sides = (_share(side, strength.cutout) for side in size)
        return tuple(
            t
            for offset, side in zip(numbers, sides)
            for t in (offset.long() - side // 2, offset.long() - side // 2 + side)
        )
    if op == "resized_crop":
        area, aspect = strength.area + first * (1 - strength.area), torch.exp((2 * numbers[1] - 1) * math.log(4 / 3))
        height, width = (area / aspect).sqrt().clamp(max=1), (area * aspect).sqrt().clamp(max=1)
        return numbers[2] * (1 - height), numbers[3] * (1 - width), height, width
    return tuple(d.long() for d in numbers)


# ---- operations ------------------------------------------------------------------------------------------------------


def brightness(x: Tensor, shift: Tensor) -> Tensor:
    """x + shift."""
    return x + _column(shift)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """The distance to the mean over channels, times a factor."""
    return torch.lerp(x.mean(1, keepdim=True).expand_as(x), x, _column(factor).to(x.dtype))


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """The distance to the mean of the image, times a factor."""
    return torch.lerp(x.mean((1, 2, 3), keepdim=True).expand_as(x), x, _column(factor).to(x.dtype))


def crop(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Shifted by whole pixels; what comes in is 0."""
    rows = torch.arange(x.shape[2], device=x.device) + down[:, None]
    columns = torch.arange(x.shape[3], device=x.device) + right[:, None]
    padded = F.pad(x, (1, 1, 1, 1))
    rows, columns = (rows + 1).clamp(0, x.shape[2] + 1), (columns + 1).clamp(0, x.shape[3] + 1)
    if len(down) == 1:
        return padded.index_select(2, rows[0]).index_select(3, columns[0])
    images = torch.arange(len(x), device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cutout(x: Tensor, top: Tensor, bottom: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """A square set to 0: rows top … bottom - 1, columns left … right - 1, clipped to the image (a square beyond the
    edge leaves its last row or column)."""
    inside = (
        _between(x.shape[2], top, bottom, x.device)[:, :, None]
        & _between(x.shape[3], left, right, x.device)[:, None, :]
    )
    return x * (~inside)[:, None].to(x.dtype)


def flip(x: Tensor, mirrored: Tensor) -> Tensor:
    """Mirrored left-right where the flag is set."""
    return torch.where(_column(mirrored), x.flip(3), x)


def scale(x: Tensor, horizontal: Tensor, vertical: Tensor, align_corners: bool = True) -> Tensor:
    """Sampled (bilinear, 0 outside) at coordinates times these factors."""
    zero = torch.zeros_like(horizontal)
    return _sampled(x, torch.stack([horizontal, zero, zero, zero, vertical, zero], -1).view(-1, 2, 3), align_corners)


def rotate(x: Tensor, angle: Tensor, align_corners: bool = True) -> Tensor:
    """Turned by an angle in radians (bilinear, 0 outside)."""
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return _sampled(x, torch.stack([cos, -sin, zero, sin, cos, zero], -1).view(-1, 2, 3), align_corners)


def resized_crop(x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """A box, as shares of the image's sides, at the image's size (bilinear)."""
    zero = torch.zeros_like(top)
    theta = torch.stack([width, zero, 2 * left + width - 1, zero, height, 2 * top + height - 1], -1).view(-1, 2, 3)
    return _sampled(x, theta, False, "border")


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (brightness, saturation, contrast, crop, cutout, flip, scale, rotate, resized_crop)
}


def _stream(generators: torch.Generator | Iterable[torch.Generator]) -> Iterator[torch.Generator]:
    return repeat(generators) if isinstance(generators, torch.Generator) else iter(generators)


def _split(strategy: str) -> list[str]:
    """`color_crop` in its groups; a name may itself hold an underscore (`resized_crop`)."""
    rest, names = strategy.replace("resized_crop", "resized-crop").split("_"), []
    for name in rest:
        if name:
            names.append(name.replace("-", "_"))
    return names


def _share(side: int, ratio: float) -> int:
    return int(side * ratio + 0.5)


def _column(value: Tensor) -> Tensor:
    return value.view(-1, 1, 1, 1)


def _between(size: int, low: Tensor, high: Tensor, device: torch.device) -> Tensor:
    """(count, size) bool. Indices beyond the edge are clamped to it, as in the published code."""
    at = torch.arange(size, device=device)
    low, high = low.clamp(0, size - 1), (high - 1).clamp(0, size - 1)
    return (at >= low[:, None]) & (at <= high[:, None])


def _sampled(x: Tensor, theta: Tensor, align_corners: bool, padding: str = "zeros") -> Tensor:
    grid = F.affine_grid(theta.to(x.dtype).expand(len(x), 2, 3), list(x.shape), align_corners=align_corners)
    return F.grid_sample(x, grid, padding_mode=padding, align_corners=align_corners)
