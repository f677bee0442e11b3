"""`instances:PATH`: images with masks of objects. PATH is a folder as `masks:` reads it (train, val and test, each with
`images` and `labels`), and may hold `objects`, masks in which every object has a number of its own.

Without such numbers, the connected parts of a class are its objects: two cars of which one hides a part of the other
are then one, and a car behind a pole may be two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import Field
from scipy import ndimage

from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data.boxes import KEYS, BoxedImage, boxed, class_ids
from stillhouse.data.formats.masks import Options as MaskOptions
from stillhouse.data.formats.masks import Pairs
from stillhouse.data.images import open_image, open_mask
from stillhouse.data.samples import SampleBundle
from stillhouse.data.source import existing
from stillhouse.errors import UserError, unknown

__all__ = ["KEYS", "REST", "Options", "load"]
REST = "PATH"
BACKGROUND = (0, 255)  # numbers of `objects` that are no object, as Pascal VOC has them


class Options(Spec):
    """data.options of images with masks of objects."""

    classes: list[str] = Field(default_factory=list, description="Class names, in the order of their ids in the masks.")
    things: list[str] = Field(
        default_factory=list, description="The classes whose objects are found, in label order; default: all."
    )
    smallest: int = Field(
        1, ge=1, description="Pixels of the smallest object; a smaller one is neither learned nor judged."
    )
    images: str = Field("images", description="The folder of images in a split.")
    labels: str = Field("labels", description="The folder of masks of class ids in a split.")
    objects: str | None = Field(
        None, description="The folder of masks of object numbers in a split; default: the connected parts of a class."
    )


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> SampleBundle:
    """The images under PATH as a bundle.

    Raises:
        UserError: no folder there, a thing that is no class, images without masks, and what
            `stillhouse.data.boxes.boxed` raises.
    """
    if not options.classes:
        raise UserError(f"data.options.classes: name the classes of '{spec.name}', in the order of their ids.")
    for name in options.things:
        if name not in options.classes:
            raise unknown("class for data.options.things", name, options.classes)
    things = class_ids(options.classes, options.things or options.classes, spec.name)
    ids = np.array([things.get(name, -1) for name in options.classes], np.int64)
    base = existing(rest, root)
    splits, sizes = {}, []
    for split in ("train", "val", "test"):
        if (base / split).is_dir():
            folders = MaskOptions(classes=options.classes, images=options.images, labels=options.labels)
            pairs = Pairs.found(base / split, folders)
            numbers: list[Path | None] = [None] * len(pairs.masks)
            if options.objects is not None:
                numbered = folders.model_copy(update={"labels": options.objects})
                numbers = list(Pairs.found(base / split, numbered).masks)
            files = [Objects(m, n, ids, options.smallest) for m, n in zip(pairs.masks, numbers)]
            splits[split] = [_boxed(f"{split}/{p.stem}", p, o) for p, o in zip(pairs.images, files)]
            sizes += [p.stat().st_size for p in pairs.images]
    return boxed(splits, list(things), spec, [sizes, options.model_dump(mode="json")])


@dataclass
class Objects:
    """The objects of an image's masks.

    Attributes:
        mask: the file of class ids.
        numbers: the file of object numbers; None: the connected parts of a class.
        ids: (C,) label of a class id; -1: no thing.
        smallest: pixels of the smallest.
    """

    mask: Path
    numbers: Path | None
    ids: np.ndarray
    smallest: int

    def parts(self) -> tuple[np.ndarray, list[int]]:
        """(H, W) int32, 0 where there is no thing, else the place of its object, from 1; and each object's label."""
        classes = open_mask(self.mask).astype(np.int64)
        labels = np.where(classes < len(self.ids), self.ids[np.minimum(classes, len(self.ids) - 1)], -1)
        numbers = None if self.numbers is None else open_mask(self.numbers).astype(np.int64)
        if numbers is not None and numbers.shape != labels.shape:
            raise UserError(f"The masks '{self.mask}' and '{self.numbers}' are of different shapes.")
        out = np.zeros(labels.shape, np.int32)
        found: list[int] = []
        for label in np.unique(labels[labels >= 0]).tolist():
            where = labels == label
            if numbers is None:
                parts, count = ndimage.label(where, np.ones((3, 3)))
            else:
                own = np.where(np.isin(numbers, BACKGROUND), 0, numbers) * where
                present = np.unique(own[own > 0])
                parts, count = np.searchsorted(present, own) + (own > 0), len(present)
            out[where] = (parts + len(found) * (parts > 0))[where]
            found += [label] * count
        return out, found

    def masks(self) -> np.ndarray:
        """(n, H, W) bool."""
        parts, labels = self.parts()
        wanted: np.ndarray = parts[None] == np.arange(1, len(labels) + 1)[:, None, None]
        return wanted


def _boxed(name: str, image: Path, objects: Objects) -> BoxedImage:
    parts, labels = objects.parts()
    boxes = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(parts)]
    areas = np.bincount(parts.ravel(), minlength=len(labels) + 1)[1:]
    return BoxedImage(
        name,
        partial(open_image, image),
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(labels, np.int64),
        areas < objects.smallest,
        (parts.shape[0], parts.shape[1]),
        objects.masks,
    )
