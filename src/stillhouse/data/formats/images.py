"""`images:PATH`: any tree of image files, without labels; or `images:NAME`, another data set whose training labels are
not read. `data.options.judge` names labelled data by which the features are judged."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from stillhouse import catalog
from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data import format as formats
from stillhouse.data.bundle import DataBundle, labelled
from stillhouse.data.dataset import IndexedDataset
from stillhouse.data.images import EXTENSIONS, image_files, open_image
from stillhouse.data.relabelled import Relabelled
from stillhouse.data.source import IMAGENET_MEAN, IMAGENET_STD, Samples, Source, evenly, existing
from stillhouse.data.splits import Splits
from stillhouse.errors import UserError
from stillhouse.files import digest
from stillhouse.tasks.features import Features

__all__ = ["KEYS", "REST", "Options", "load"]
KEYS = frozenset({"image_size", "augment", "views"})
REST = "PATH or another data set"
TESTED = 0.1
"""Share of a tree's images that become its test split, where no labelled data judge."""


class Options(Spec):
    """data.options of `images:`."""

    judge: DataSpec | None = Field(
        None, description="Labelled images; their test split is what probes learn from, by halves, and are judged by."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Of the other data set.")


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> FeatureBundle:
    """The images under PATH, or of another data set, which then is judged by its own test split.

    Raises:
        UserError: no images, or a data set that is not one of labelled images.
    """
    if not _is_named(rest):
        images = labelled(_tree(existing(rest, root)), spec)
        judge = None if options.judge is None else _labelled(options.judge, spec, root)
    else:
        images = _labelled(spec.model_copy(update={"name": rest, "options": options.options}), spec, root)
        judge = images if options.judge is None else _labelled(options.judge, spec, root)
    shape, mean, std = images.input_shape, images.mean, images.std
    if judge is not None and (judge.input_shape, judge.mean, judge.std) != (shape, mean, std):
        raise UserError(
            f"images: '{judge.name}' judges features of images {judge.input_shape} normalised by {judge.mean}, but "
            f"'{spec.name}' gives {shape} by {mean}; set data.image_size, or take data of one kind."
        )
    task = Features(() if judge is None else tuple(judge.classes), shape, mean, std)
    prints = [images.fingerprint, "" if judge is None else judge.fingerprint]
    return FeatureBundle(spec.name, task, digest("unlabelled", *prints), images, judge)


def _is_named(rest: str) -> bool:
    """Whether this is another data set by name, and no path."""
    try:
        catalog.data_format(rest.partition(":")[0])
    except UserError:
        return False
    return True


def _labelled(given: DataSpec, outer: DataSpec, root: Path) -> DataBundle:
    size = given.image_size or outer.image_size
    bundle: Any = formats.load(given.model_copy(update={"image_size": size}), given.root or root)
    if not isinstance(bundle, DataBundle) or len(bundle.input_shape) != 3 or not bundle.mean:
        raise UserError(f"images: '{given.name}' is not a data set of labelled images.")
    return bundle


def _tree(base: Path) -> Source:
    if not base.is_dir():
        raise UserError(f"images: '{base}' is a file; name a folder of images.")
    paths = image_files(base)
    if not paths:
        raise UserError(f"images: '{base}' holds no images ({', '.join(EXTENSIONS)}), nor does a folder in it.")
    names = [os.path.relpath(p, base) for p in paths]
    sizes = [os.path.getsize(paths[i]) for i in evenly(len(paths), 10_000)]
    step = max(2, round(1 / TESTED))
    test = np.arange(len(paths)) % step == step - 1

    def part(rows: np.ndarray) -> Samples:
        chosen = [paths[i] for i in rows]
        return Samples(np.zeros(len(rows), np.int64), digest([names[i] for i in rows], sizes), _Opened(chosen).item)

    train, held = part(np.flatnonzero(~test)), part(np.flatnonzero(test))
    return Source(train, ["image"], (3, 224, 224), test=held, mean=IMAGENET_MEAN, std=IMAGENET_STD)


@dataclass
class _Opened:
    paths: list[str]

    def item(self, position: int) -> Image.Image:
        return open_image(self.paths[position]).convert("RGB")


@dataclass
class FeatureBundle(Splits):
    """Images without labels, ready for use; its test split has labels where labelled data judge.

    Attributes:
        name: as in the recipe.
        task: features.
        fingerprint: a hash of the images and of those that judge.
        images: what is trained on.
        judge: what features are judged by; None: held-out images without labels.
    """

    name: str
    task: Features
    fingerprint: str
    images: DataBundle = field(repr=False)
    judge: DataBundle | None = field(repr=False)

    evaluation_batch: ClassVar[int] = 256

    @property
    def splits(self) -> list[str]:  # type: ignore[override]
        return [s for s in ("train", "holdout", "val", "test") if self._of(s).has(s)]

    def _of(self, split: str) -> DataBundle:
        return self.judge if self.judge is not None and split in ("val", "test") else self.images

    def dataset(self, split: str, *, train: bool) -> IndexedDataset | Relabelled:
        """A split, whose labels are -1 but for the images that judge."""
        self.require(split)
        samples = self._of(split).dataset(split, train=train)
        if self.judge is not None and split in ("val", "test"):
            return samples
        return Relabelled(samples, torch.full((len(samples),), -1))
