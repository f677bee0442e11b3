"""`voc:PATH`: images with boxes in a Pascal VOC folder: JPEGImages, Annotations (XML), and ImageSets/Main (the splits).

Corners in the files count pixels from 1 and the last pixel belongs to the box, as in the VOC development kit.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data.boxes import KEYS, BoxedImage, boxed, class_ids
from stillhouse.data.images import EXTENSIONS, is_system, open_image
from stillhouse.data.samples import SampleBundle
from stillhouse.data.source import existing
from stillhouse.errors import UserError, unknown

__all__ = ["KEYS", "REST", "Options", "load"]
REST = "PATH"
CORNERS = ("xmin", "ymin", "xmax", "ymax")


class Options(Spec):
    """data.options of a Pascal VOC folder."""

    classes: list[str] = Field(
        default_factory=list,
        description="Class names in label order; objects of others are left out. Default: all that occur, by name.",
    )
    new: list[str] = Field(
        default_factory=list, description="Classes, by name, whose boxes training does not see: new at test time."
    )
    difficult: bool = Field(
        False, description="Learn and judge objects marked difficult as any other; else neither, as VOC has it."
    )
    train: str = Field("train", description="The file of ImageSets/Main that lists the training images.")
    val: str = Field("val", description="The same of the images for validation, where there is such a file.")
    test: str = Field("test", description="The same of the test images; without both, a part of train is taken.")


@dataclass
class _Object:
    name: str
    corners: list[float]
    difficult: bool


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> SampleBundle:
    """The images of a Pascal VOC folder as a bundle.

    Raises:
        UserError: no such folder, a missing or unreadable file, an annotation that lacks something, and what
            `stillhouse.data.boxes.boxed` raises.
    """
    return read(existing(rest, root), spec, options)


def read(base: Path, spec: DataSpec, options: Options) -> SampleBundle:
    """The images of this folder as a bundle; raises as `load`."""
    if not (base / "Annotations").is_dir():
        inside = next((p.parent for p in sorted(base.glob("*/*/Annotations"))), None)
        hint = f"; did you mean 'voc:{inside}'?" if inside else "."
        raise UserError(f"'{base}' is no Pascal VOC folder: it has no Annotations{hint}")
    names = _splits(base, options)
    parsed = {split: [(n, *_annotation(base, n)) for n in listed] for split, listed in names.items()}
    occur = [o.name for part in parsed.values() for _, _, objects in part for o in objects]
    ids = class_ids(occur, options.classes, spec.name)
    for wanted in options.classes:
        if wanted not in occur:
            raise unknown("class for data.options.classes", wanted, sorted(set(occur)), f" in '{base}'")
    files = {p.stem: p for p in sorted((base / "JPEGImages").iterdir()) if p.suffix.lower() in EXTENSIONS}
    splits = {}
    for split, part in parsed.items():
        images = []
        for name, size, objects in part:
            if name not in files:
                raise UserError(f"'{base / 'JPEGImages'}' holds no image '{name}', which {split}.txt lists.")
            chosen = [o for o in objects if o.name in ids]
            boxes = np.array([o.corners for o in chosen], np.float64).reshape(-1, 4)
            boxes[:, :2] -= np.where(boxes[:, 2:] > boxes[:, :2], 1, 0)  # of pixels from 1; one without area stays so
            labels = np.array([ids[o.name] for o in chosen], np.int64)
            crowd = np.array([o.difficult and not options.difficult for o in chosen], bool)
            images.append(BoxedImage(name, partial(open_image, files[name]), boxes, labels, crowd, size))
        splits[split] = images
    return boxed(splits, list(ids), spec, sorted(p.stat().st_size for p in files.values()), options.new)


def _splits(base: Path, options: Options) -> dict[str, list[str]]:
    """The images' names by split; without lists, all images are for training."""
    folder, out = base / "ImageSets" / "Main", {}
    for split in ("train", "val", "test"):
        named = getattr(options, split)
        path = folder / f"{named}.txt"
        if path.is_file():
            out[split] = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        elif split in options.model_fields_set or (split == "train" and folder.is_dir()):
            there = [p.stem for p in sorted(folder.glob("*.txt"))] if folder.is_dir() else []
            raise unknown(f"list for data.options.{split}", named, there, f" in '{folder}'")
    if not out:
        found = sorted((base / "Annotations").glob("*.xml"))
        out["train"] = [p.stem for p in found if not is_system(p.name)]
    seen: dict[str, str] = {}
    for split, names in out.items():
        for name in names:
            if name in seen and seen[name] != split:
                raise UserError(f"The image '{name}' is in {seen[name]}.txt and in {split}.txt of '{folder}'.")
            seen[name] = split
    return out


def _annotation(base: Path, name: str) -> tuple[tuple[int, int] | None, list[_Object]]:
    """The size of an image as its file says, and its objects. Raises `UserError` that names the file."""
    path = base / "Annotations" / f"{name}.xml"
    if not path.is_file():
        raise UserError(f"The image '{name}' has no annotation: '{path}' is not there.")
    try:
        tree = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise UserError(f"'{path}' is no readable XML ({error}); replace or remove it.") from None
    height, width = (_number(tree.findtext(f"size/{k}") or "0", path, k) for k in ("height", "width"))
    objects = []
    for found in tree.iter("object"):
        label, box = (found.findtext("name") or "").strip(), found.find("bndbox")
        if not label or box is None:
            raise UserError(f"'{path}' has an object without {'a name' if not label else 'a bndbox'}; correct it.")
        corners = [_number(box.findtext(k), path, k) for k in CORNERS]
        objects.append(_Object(label, corners, (found.findtext("difficult") or "0").strip() == "1"))
    return (int(height), int(width)) if height and width else None, objects


def _number(text: Any, path: Path, key: str) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        raise UserError(f"'{path}' has no number for {key}, but {text!r}; correct it.") from None
