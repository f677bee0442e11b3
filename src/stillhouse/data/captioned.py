"""`captioned`: images with captions of their own as a bundle, whatever they are read from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from stillhouse.config.specs import DataSpec
from stillhouse.data.bundle import labelled
from stillhouse.data.image_text import (
    ImageTextBundle,
    PairedDataset,
    Part,
    TextOptions,
    text_identity,
    text_side,
)
from stillhouse.data.source import IMAGENET_MEAN, IMAGENET_STD, Samples, Source
from stillhouse.errors import UserError
from stillhouse.files import digest
from stillhouse.tasks.image_text import ImageText

KEYS = frozenset({"image_size", "augment"})
"""Keys of `DataSpec` that captioned images heed."""
SPLITS = ("train", "val", "test")


class CaptionedOptions(TextOptions):
    """data.options of images with captions of their own."""

    classes: list[str] = Field(
        default_factory=list, description="Class names to judge by, and to predict; captions have no part in them."
    )


@dataclass
class CaptionedImages:
    """The images of a split.

    Attributes:
        names: of each, for the fingerprint.
        captions: of each, one or more.
        item: the image at a position.
    """

    names: list[str]
    captions: list[list[str]]
    item: Callable[[int], Any]


def captioned(
    found: Mapping[str, CaptionedImages], spec: DataSpec, options: CaptionedOptions, root: Path
) -> ImageTextBundle:
    """Captioned images by split as a bundle; without a test split, a fifth of the training images becomes one.

    Raises:
        UserError: no training images, an image without a caption, or what `text_side` raises.
    """
    if "train" not in found or not found["train"].names:
        raise UserError(f"The data set '{spec.name}' holds no captioned training images.")
    for part in found.values():
        for name, captions in zip(part.names, part.captions):
            if not any(c.strip() for c in captions):
                raise UserError(f"The image '{name}' of '{spec.name}' has no caption; give it one, or leave it out.")
    samples = {
        split: Samples(np.zeros(len(p.names), np.int64), digest(p.names, p.captions), p.item)
        for split, p in found.items()
    }
    source = Source(
        samples["train"],
        ["image"],
        (3, 224, 224),
        test=samples.get("test"),
        val=samples.get("val"),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        flip=False,
    )
    inner = labelled(source, spec)
    texts = [c for some in found["train"].captions for c in some]
    tokens = text_side(options, texts, root, spec.name)
    size = (inner.input_shape[-2], inner.input_shape[-1])
    task = ImageText(
        size, inner.mean, inner.std, tokens, options.context, tuple(options.classes), tuple(options.templates)
    )
    first = len(options.classes)  # ids below are classes
    fingerprint = digest(inner.fingerprint, list(options.classes), *text_identity(options, tokens))

    def make(split: str, train: bool) -> PairedDataset:
        origin = split if split in found else "train"
        positions = inner.positions(split)
        captions: Sequence[Sequence[str]] = [found[origin].captions[i] for i in positions.tolist()]
        ids = first + positions + (0 if origin == "train" else len(found["train"].names) * SPLITS.index(origin))
        images = inner.dataset(split, train=train)
        part = Part(images, np.arange(len(positions)), ids, captions, task.normalisation)
        return PairedDataset([part], task, train)

    splits = [s for s in ("train", "holdout", "val", "test") if inner.has(s)]

    def named(split: str) -> list[str]:
        origin = split if split in found else "train"
        return [found[origin].names[i] for i in inner.positions(split).tolist()]

    return ImageTextBundle(spec.name, task, fingerprint, splits, make, named=named)
