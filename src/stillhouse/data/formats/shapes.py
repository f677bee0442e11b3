"""`shapes`: drawn circles, squares, triangles and crosses, still or moving, of which position, size and brightness are
known.

A shape has any place, size and brightness, and in clips any direction and speed; it bounces off the borders. A clip's
frames are its channels: (frames, size, size). For seconds and for measurements; real data is elsewhere.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data.bundle import KEYS, DataBundle, labelled
from stillhouse.data.source import Source, in_memory
from stillhouse.randomness import generator

__all__ = ["KEYS", "REST", "Options", "load"]
REST = ""
SHAPES = ("circle", "square", "triangle", "cross")
LARGEST, SMALLEST = 0.32, 0.2  # half a shape's extent, as a share of the picture's side
DIMMEST = 0.5  # brightness
SLOWEST, FASTEST = 0.04, 0.1  # of the side, a frame


class Options(Spec):
    """data.options of `shapes`."""

    size: int = Field(16, ge=8, le=256, description="Pixels a side.")
    frames: int = Field(1, ge=1, le=256, description="1: still.")
    count: int = Field(1000, ge=2, description="Training samples of each shape; a fifth more for tests.")


def drawn(shape: int, place: Tensor, radius: Tensor, brightness: Tensor, size: int) -> Tensor:
    """Pictures (n, size, size) in [0, 1] of shapes, with soft edges of a pixel.

    Args:
        shape: its number in `SHAPES`.
        place: (n, 2) of the centre, right and down, in shares of the side.
        radius, brightness: (n,) half the extent in the same shares, and how bright it is.
    """
    at = (torch.arange(size) + 0.5) / size
    x, y = at[None, None, :] - place[:, :1, None], at[None, :, None] - place[:, 1:, None]
    r = radius[:, None, None]
    if shape == 0:
        inside = r - (x.square() + y.square()).sqrt()
    elif shape == 1:
        inside = 0.886 * r - torch.maximum(x.abs(), y.abs())  # of the circle's area
    elif shape == 2:
        slope = math.sqrt(3) / 2
        inside = torch.minimum(0.6 * r - y, 0.6 * r + y / 2 - slope * x.abs() + 0 * x)
    else:
        bar = 0.36 * r
        across = torch.minimum(r - x.abs(), bar - y.abs())
        inside = torch.maximum(across, torch.minimum(r - y.abs(), bar - x.abs()))
    return (inside * size + 0.5).clamp(0, 1) * brightness[:, None, None]


def clips(shape: int, count: int, options: Options, *keys: int | str) -> Tensor:
    """(count, frames, size, size) uint8 clips of one shape, a function of the keys."""
    draw = generator("shapes", shape, *keys)
    uniform = torch.rand(count, 6, generator=draw)
    radius = SMALLEST + (LARGEST - SMALLEST) * uniform[:, 0]
    brightness = DIMMEST + (1 - DIMMEST) * uniform[:, 1]
    room = (1 - 2 * radius)[:, None]
    turn, speed = 2 * math.pi * uniform[:, 4], SLOWEST + (FASTEST - SLOWEST) * uniform[:, 5]
    step = torch.stack([turn.cos(), turn.sin()], 1) * speed[:, None]
    frames = []
    for frame in range(options.frames):
        path = (uniform[:, 2:4] * room + frame * step) / room % 2  # there and back
        place = radius[:, None] + room * torch.where(path > 1, 2 - path, path)
        frames.append(drawn(shape, place, radius, brightness, options.size))
    return (torch.stack(frames, 1) * 255).round().to(torch.uint8)


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> DataBundle:
    """As many drawn samples of each shape as the options say, the same for every seed."""
    parts = []
    for split, count in (("train", options.count), ("test", max(options.count // 5, 1))):
        images = torch.cat([clips(i, count, options, split, options.size) for i in range(len(SHAPES))])
        parts.append(in_memory(images, np.repeat(np.arange(len(SHAPES)), count).astype(np.int64)))
    pixels = in_unit(parts[0].pixels(np.arange(len(parts[0]))))  # type: ignore[misc]
    mean, std = (round(float(v), 4) for v in (pixels.mean(), pixels.std()))
    shape = (options.frames, options.size, options.size)
    form = {"mean": (mean,) * options.frames, "std": (std,) * options.frames}
    return labelled(Source(parts[0], list(SHAPES), shape, test=parts[1], flip=False, **form), spec)  # type: ignore[arg-type]


def in_unit(images: Tensor) -> Tensor:
    """uint8 images as floats in [0, 1]."""
    return images.float() / 255
