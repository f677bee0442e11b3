"""Sequences of (input, label) as a source: what the data sets of other libraries and a user's own are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stillhouse.data.dataset import as_tensor
from stillhouse.data.images import channels, from_array, standard
from stillhouse.data.labels import unnamed
from stillhouse.data.source import IMAGENET_MEAN, IMAGENET_STD, SMALL, Samples, Source, evenly
from stillhouse.errors import UserError
from stillhouse.files import digest


@dataclass
class _Inputs:
    """The inputs of a sequence of (input, label, …)."""

    pairs: Any

    def item(self, position: int) -> Any:
        return self.pairs[int(position)][0]


def sequence_samples(found: Any, labels: np.ndarray) -> Samples:
    """The samples of a sequence of (input, label, …), with these labels (N,)."""
    return sampled(labels, _Inputs(found).item)


def sampled(labels: np.ndarray, item: Callable[[int], Any]) -> Samples:
    """Samples whose identity is their labels and the content of 16 of them."""
    return Samples(labels, digest(labels, *(_content(item(int(i))) for i in evenly(len(labels), 16))), item)


def _content(value: Any) -> Any:
    if isinstance(value, dict):
        return digest(*(x for k in sorted(value) for x in (k, _content(value[k]))))
    return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)


def source_of(
    samples: Mapping[str, Samples | None], classes: Any, what: str, flip: bool = True, depth: int | None = None
) -> Source:
    """A source whose kind of input and size are those of its first training sample.

    Args:
        samples: by split.
        classes: names, or None.
        what: what messages call it.
        flip: whether a mirrored image keeps its class.
        depth: channels of its images, where they are known; default: 3 if any of 1,000 images of a split is in colour.
    """
    train = samples["train"]
    assert train is not None
    parts = {k: s for k, s in samples.items() if s is not None and len(s)}
    if not parts.get("train"):
        raise UserError("The training split holds no samples.")
    names = [str(c) for c in classes] if classes else unnamed([s.labels for s in parts.values()], what)
    first = _input(train.item(0), what)
    shape: tuple[int, ...] = ()
    if isinstance(first, Image.Image):
        depth = depth or channels(_grey(s.item(int(i)), what) for s in parts.values() for i in evenly(len(s), 1000))
        side = max(first.size) if max(first.size) <= SMALL else 224
        shape = (depth, first.height, first.width) if train.pixels else (depth, side, side)
    elif isinstance(first, Tensor):
        shape = tuple(first.shape)
    elif not isinstance(first, Mapping):
        raise UserError(
            f"{what}: inputs must be images, arrays, or mappings of arrays; the first is a {type(first).__name__}."
        )
    image = isinstance(first, Image.Image) or (
        isinstance(first, Tensor) and first.dtype == torch.uint8 and first.ndim == 3
    )
    usual = (
        (None, None)
        if train.pixels
        else ((), ())
        if not image
        else (IMAGENET_MEAN, IMAGENET_STD)
        if shape[0] == 3
        else ((0.5,), (0.5,))
    )
    return Source(
        train, names, shape, test=parts.get("test"), val=parts.get("val"), mean=usual[0], std=usual[1], flip=flip
    )


def _input(value: Any, what: str) -> Any:
    """An image where it is one, else a tensor or what it was."""
    if isinstance(value, np.ndarray) and value.dtype in (np.uint8, np.uint16) and value.ndim in (2, 3):
        value = from_array(value, f"{what}: the first input")
    return standard(value, f"{what}: the first input") if isinstance(value, Image.Image) else as_tensor(value)


def _grey(value: Any, what: str) -> bool:
    found = _input(value, what)
    return isinstance(found, Image.Image) and found.mode == "L"
