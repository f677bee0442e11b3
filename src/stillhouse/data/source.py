"""What every format gives: `Samples` (labels, and inputs on demand) in a `Source` of splits; and the folders that data
is found and cached in."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.config.specs import NamedSpec
from stillhouse.errors import UserError, nearest
from stillhouse.files import cache_folder, digest

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = 96  # images up to this many pixels a side are decoded into memory at once


@dataclass
class Samples:
    """The samples of one split of a source.

    Attributes:
        labels: (N,) int64.
        identity: names the content: equal data has an equal identity on every machine.
        item: the input at a position: a PIL image, a uint8 tensor (C, H, W), or a float tensor of any shape that is
            used as it is.
        pixels: for images that fit into memory: the images (n, C, H, W) at these positions, decoded at once; uint8, or
            float pixels.
    """

    labels: np.ndarray
    identity: str
    item: Callable[[int], Any]
    pixels: Callable[[np.ndarray], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Source:
    """A data set as it is found, before subset, splits and noise.

    Attributes:
        train, test, val: its splits; where `test` is absent, a share of `train` is taken instead.
        classes: class names in label order.
        shape: (C, H, W) of a model's input, or any shape for float inputs.
        mean, std: the usual normalisation per channel; None: measured on `train`; (): none, for float inputs.
        flip: whether a mirrored image keeps its class (not so for digits).
    """

    train: Samples
    classes: list[str]
    shape: tuple[int, ...]
    test: Samples | None = None
    val: Samples | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    flip: bool = True


def find_root(spec: NamedSpec | None, given: str | Path | None = None) -> Path:
    """The folder that holds the data: the recipe's, else the one given, else STILLHOUSE_DATA, else `data` in the
    cache."""
    chosen = (spec.root if spec else None) or given or os.environ.get("STILLHOUSE_DATA")
    return Path(chosen).expanduser() if chosen else cache_folder() / "data"


def existing(path: str, root: Path) -> Path:
    """A path as given, or under the data root. Raises `UserError` with the nearest sibling."""
    tried = Path(path).expanduser()
    for candidate in (tried, root / tried):
        if candidate.is_file() or candidate.is_dir():
            return candidate
        if candidate.exists():
            raise UserError(f"'{candidate}' is neither a file nor a folder (a pipe or a device?); name one that is.")
    siblings = {p.name: p for place in (root / tried, tried) if place.parent.is_dir() for p in place.parent.iterdir()}
    close = nearest(tried.name, siblings, 1)
    hint = f"; did you mean '{siblings[close[0]]}'?" if close else f", nor under the data root '{root}'."
    raise UserError(f"There is no file or folder '{path}'{hint}")


def located(value: Any, root: Path) -> Any:
    """Options of networks with the files and folders that they name, which may lie under the data root: the value of
    every key `checkpoint`, and of every key `model` that begins with `hf:`. What is on neither place is left as it is.
    """
    if isinstance(value, Mapping):
        return {k: _placed(k, v, root) for k, v in value.items()}
    return [located(v, root) for v in value] if isinstance(value, list) else value


def _placed(key: str, value: Any, root: Path) -> Any:
    if key == "checkpoint" and isinstance(value, Mapping):
        return {k: _placed("checkpoint" if k == "path" else k, v, root) for k, v in value.items()}
    if not isinstance(value, str):
        return located(value, root)
    scheme = "hf:" if key == "model" and value.startswith("hf:") else ""
    path = Path(value.removeprefix(scheme)).expanduser()
    if (key == "checkpoint" or scheme) and not path.exists() and (root / path).exists():
        return f"{scheme}{root / path}"
    return value


def evenly(n: int, count: int) -> np.ndarray:
    """At most `count` positions spread evenly over range(n)."""
    return np.unique(np.linspace(0, n - 1, min(n, count)).astype(np.int64)) if n else np.zeros(0, np.int64)


def measured(samples: Samples) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of at most 2,000 images spread over the set, in [0, 1]; whatever subset
    is trained on."""
    assert samples.pixels is not None
    images = samples.pixels(evenly(len(samples), 2000)).to(torch.float64) / 255
    std = images.std(dim=(0, 2, 3), correction=0).clamp_min(1e-3)
    return tuple(round(v, 4) for v in images.mean(dim=(0, 2, 3)).tolist()), tuple(round(v, 4) for v in std.tolist())


@dataclass
class InMemoryImages:
    """Images (N, C, H, W), uint8 or float pixels, as `Samples` read them."""

    images: Tensor

    def __call__(self, positions: np.ndarray) -> Tensor:
        return self.images if len(positions) == len(self.images) else self.images[torch.from_numpy(positions)]

    def item(self, position: int) -> Tensor:
        return self.images[position]


def in_memory(images: Tensor, labels: np.ndarray) -> Samples:
    """Samples of uint8 images (N, C, H, W) that are all in memory."""
    held = InMemoryImages(images)
    return Samples(
        labels,
        digest(tuple(images.shape), images[torch.from_numpy(evenly(len(images), 1000))].numpy()),
        held.item,
        held,
    )
