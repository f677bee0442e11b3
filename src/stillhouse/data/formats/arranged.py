"""`arranged`: two handwritten digits on one picture, side by side or one above the other; the class is the caption.

The digits are scikit-learn's, 8 x 8 pixels on 16 x 16, each moved a little across the line that they stand on. A
caption is "three left of seven" or "three above seven"; both digits differ, so that there are 180. Training pictures
are made of training digits alone, and test pictures of test digits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data.bundle import KEYS, DataBundle, labelled
from stillhouse.data.dataset import BatchKey
from stillhouse.data.formats import digits
from stillhouse.data.source import Source, in_memory
from stillhouse.functional.pictures import unnormalise
from stillhouse.randomness import generator

__all__ = ["KEYS", "REST", "Options", "load"]
REST = ""
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = ("left of", "above")
SIDE = 16


class Options(Spec):
    """data.options of `arranged`."""

    count: int = Field(40, ge=2, description="Training pictures of each caption; a quarter more for tests.")
    digits: int = Field(10, ge=2, le=10, description="Only the first of them: n (n - 1) captions of each relation.")


def captions(count: int) -> list[tuple[int, int, int]]:
    """(relation, first digit, second digit) of each caption of so many digits."""
    return [(r, a, b) for r in range(len(RELATIONS)) for a in range(count) for b in range(count) if a != b]


def caption(relation: int, first: int, second: int) -> str:
    """The caption in words."""
    return f"{WORDS[first]} {RELATIONS[relation]} {WORDS[second]}"


def arranged(relation: int, first: Tensor, second: Tensor, shift: Tensor) -> Tensor:
    """Pictures (n, 1, 16, 16) of two images (n, 8, 8) each.

    Args:
        relation: its number in `RELATIONS`.
        shift: (n, 2) pixels, 0 to 8, by which each is moved across.
    """
    half = SIDE // 2
    out = first.new_zeros(len(first), 1, SIDE, SIDE)
    for i, images in enumerate((first, second)):
        for n, image in enumerate(images):
            along, across = i * half, int(shift[n, i])
            row, column = (across, along) if relation == 0 else (along, across)
            out[n, 0, row : row + half, column : column + half] = image
    return out


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> DataBundle:
    """As many pictures of each caption as the options say, the same for every seed."""
    plain = digits.load("", DataSpec(name="digits"), digits.Options(), root)
    every, parts = captions(options.digits), []
    for split, count in (("train", options.count), ("test", max(options.count // 4, 1))):
        images, labels = _whole(plain, split)
        of_class = [images[labels == c] for c in range(options.digits)]
        pictures = []
        for relation, a, b in every:
            draw = generator("arranged", split, relation, a, b)
            pair = [of_class[c][torch.randint(len(of_class[c]), (count,), generator=draw)] for c in (a, b)]
            shift = torch.randint(SIDE // 2 + 1, (count, 2), generator=draw)
            pictures.append(arranged(relation, pair[0], pair[1], shift))
        parts.append(in_memory(torch.cat(pictures), np.repeat(np.arange(len(every)), count).astype(np.int64)))
    names = [caption(*c) for c in every]
    found = Source(parts[0], names, (1, SIDE, SIDE), test=parts[1], mean=(0.1527,), std=(0.3069,), flip=False)
    return labelled(found, spec)


def _whole(bundle: DataBundle, split: str) -> tuple[Tensor, Tensor]:
    """All images (n, 8, 8) uint8 of a split of the digits, with their classes."""
    dataset = bundle.dataset(split, train=False)
    every = np.arange(len(dataset))
    batch = dataset.batch(BatchKey(0, every, 0, len(every)), 0)
    return unnormalise(batch["input"], bundle.task.mean, bundle.task.std)[:, 0], batch["label"]
