"""Folders of image files, a folder a class, as torchvision's ImageFolder reads them: PATH/train/CLASS/*.jpg, or
PATH/CLASS/*.jpg."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from stillhouse.config.specs import DataSpec
from stillhouse.data.bundle import KEYS, DataBundle, labelled
from stillhouse.data.format import NoOptions as Options
from stillhouse.data.images import EXTENSIONS, image_files, is_system, open_image
from stillhouse.data.labels import class_order
from stillhouse.data.layouts import refuse_other_layouts
from stillhouse.data.source import IMAGENET_MEAN, IMAGENET_STD, Samples, Source, evenly, existing
from stillhouse.errors import UserError, nearest
from stillhouse.files import digest

__all__ = ["KEYS", "REST", "Options", "load", "source"]
REST = "PATH"


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> DataBundle:
    """The images under PATH as a bundle (see `source`)."""
    return labelled(source(existing(rest, root)), spec)


def source(base: Path) -> Source:
    """The images under a folder.

    With a `train` folder: `val` and `test` next to it are those splits; a lone `val` (ImageNet's layout) is the test
        split, and validation is
    then cut from training by `data.val`. Without one, the class folders are the training set, and a fifth of it becomes
    the test split. Classes are in the order of their names, or of their numbers where all are whole numbers.

    Raises:
        UserError: a file, a folder of boxes or masks, no class folders, a class without
            images, or a class that only the test split has.
    """
    if not base.is_dir():
        raise UserError(f"imagefolder: '{base}' is a file; name the folder that holds train/, or the class folders.")
    train = base / "train" if (base / "train").is_dir() else base
    refuse_other_layouts(base)
    classes = class_order(_folders(train))
    if not classes:
        raise UserError(f"imagefolder: '{train}' holds no class folders; images are expected as '{train}/CLASS/*.jpg'.")
    samples, counts = _scan(train, classes)
    if not counts.all():
        empty = train / classes[int(counts.argmin())]
        raise UserError(
            f"imagefolder: the class folder '{empty}' holds no images ({', '.join(EXTENSIONS)}); fill or remove it."
        )
    others = {
        name: _scan(base / name, classes)[0]
        for name in ("val", "valid", "test")
        if train != base and (base / name).is_dir()
    }
    val, test = others.get("val") or others.get("valid"), others.get("test")
    if test is None:
        val, test = None, val
    return Source(samples, classes, (3, 224, 224), test=test, val=val, mean=IMAGENET_MEAN, std=IMAGENET_STD)


@dataclass
class _Files:
    paths: list[str]

    def item(self, position: int) -> Image.Image:
        return open_image(self.paths[position])


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_system(entry.name))


def _scan(folder: Path, classes: list[str]) -> tuple[Samples, np.ndarray]:
    """All images below the class folders, in the order of their names; and how many each class has."""
    ids = {name: i for i, name in enumerate(classes)}
    paths: list[str] = []
    labels: list[int] = []
    for name in _folders(folder):
        if name not in ids:
            close = nearest(name, classes, 1)
            hint = f"; did you mean '{close[0]}'?" if close else "."
            raise UserError(f"imagefolder: '{folder / name}' is a class that the training set does not have{hint}")
        found = image_files(folder / name)
        paths += found
        labels += [ids[name]] * len(found)
    if not paths:
        raise UserError(f"imagefolder: '{folder}' holds no images ({', '.join(EXTENSIONS)}) in its class folders.")
    sizes = [os.path.getsize(paths[i]) for i in evenly(len(paths), 10_000)]
    names = [os.path.relpath(p, folder) for p in paths]
    samples = Samples(np.array(labels, dtype=np.int64), digest(names, sizes), _Files(paths).item)
    return samples, np.bincount(samples.labels, minlength=len(classes))
