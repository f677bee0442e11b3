"""`coco:PATH`: images with boxes by a COCO JSON: a folder with such files and the images, or one file.

Known layouts of a folder: `annotations/instances_train2017.json` with the images in `train2017` (any year, or none),
and `train/_annotations.coco.json` next to the images; else data.options name the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data.boxes import KEYS, BoxedImage, boxed, class_ids
from stillhouse.data.images import open_image
from stillhouse.data.samples import SampleBundle
from stillhouse.data.source import existing
from stillhouse.errors import UserError, nearest, unknown

__all__ = ["KEYS", "REST", "Options", "load"]
REST = "PATH"
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


class Options(Spec):
    """data.options of COCO JSON."""

    classes: list[str] = Field(
        default_factory=list,
        description="Category names in label order; boxes of others are left out. Default: all categories, by id.",
    )
    new: list[str] = Field(
        default_factory=list, description="Classes, by name, whose boxes training does not see: new at test time."
    )
    train: str | None = Field(None, description="The JSON file of the training images, in the folder.")
    val: str | None = Field(None, description="The same for validation.")
    test: str | None = Field(None, description="The same for testing.")
    images: str | None = Field(
        None, description="The folder that file names are relative to; default: found by each JSON file."
    )


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> SampleBundle:
    """Images with boxes by COCO JSON as a bundle. Category ids may begin anywhere and have gaps: a label is the place
    of its category.

    Raises:
        UserError: a missing or unreadable file; an annotation of an image or a category that is not there; splits with
            other categories; and what `stillhouse.data.boxes.boxed` raises.
    """
    base = existing(rest, root)
    files = {"train": base} if base.is_file() else _files(base, options)
    read = {split: _Annotations(path) for split, path in files.items()}
    names = read["train"].categories
    for split, found in read.items():
        if set(found.categories.values()) != set(names.values()):
            odd = sorted(set(found.categories.values()) ^ set(names.values()))
            raise UserError(
                f"'{found.path}' ({split}) has other categories than '{read['train'].path}': {', '.join(odd[:5])}."
            )
    if len(set(names.values())) < len(names):
        twice = next(n for n in names.values() if list(names.values()).count(n) > 1)
        raise UserError(f"'{read['train'].path}' has two categories named '{twice}'; give each a name of its own.")
    for wanted in options.classes:
        if wanted not in names.values():
            raise unknown("category for data.options.classes", wanted, names.values(), f" in '{rest}'")
    ids = class_ids((), options.classes or [names[i] for i in sorted(names)], spec.name)
    splits = {split: found.images(ids, base, options) for split, found in read.items()}
    return boxed(splits, list(ids), spec, new=options.new)


def _files(base: Path, options: Options) -> dict[str, Path]:
    """The JSON file of each split."""
    out = {}
    for split, words in SPLITS.items():
        named = getattr(options, split)
        if named is not None:
            out[split] = base / named
            if not out[split].is_file():
                there = [str(p.relative_to(base)) for p in sorted(base.rglob("*.json"))[:200]]
                raise unknown(f"file for data.options.{split}", named, there, f" in '{base}'")
            continue
        for word in words:
            places = [base / word / "_annotations.coco.json"]
            places += sorted((base / "annotations").glob(f"instances_{word}*.json"))
            places += [base / "annotations" / f"{word}.json", base / f"{word}.json"]
            found = next((p for p in places if p.is_file()), None)
            if found is not None:
                out[split] = found
                break
    if "train" not in out:
        raise UserError(
            f"'{base}' holds no COCO annotations that are known by their place, such as "
            "annotations/instances_train.json or train/_annotations.coco.json; name the file in data.options.train."
        )
    return out


class _Annotations:
    """A COCO JSON file, read and checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"'{path}' is no readable JSON ({error}); replace it.") from None
        if not isinstance(content, Mapping) or not {"images", "categories"} <= set(content):
            raise UserError(f"'{path}' is no COCO file: it needs `images`, `annotations` and `categories`.")
        self.categories: dict[int, str] = {c["id"]: str(c["name"]) for c in content["categories"]}
        self._images: dict[Any, Mapping[str, Any]] = {}
        for image in content["images"]:
            if image["id"] in self._images:
                raise UserError(f"'{path}' has two images with the id {image['id']}.")
            self._images[image["id"]] = image
        self._by_image: dict[Any, list[Mapping[str, Any]]] = {i: [] for i in self._images}
        for annotation in content.get("annotations", []):
            self._check(annotation)
            self._by_image[annotation["image_id"]].append(annotation)

    def _check(self, annotation: Mapping[str, Any]) -> None:
        where = f"'{self.path}': the annotation {annotation.get('id', '')}"
        if annotation.get("image_id") not in self._images:
            raise UserError(f"{where} is of the image {annotation.get('image_id')}, which is not listed.")
        if annotation.get("category_id") not in self.categories:
            raise UserError(f"{where} is of the category {annotation.get('category_id')}, which is not listed.")
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4:
            raise UserError(f"{where} has no `bbox` of four numbers, but {box!r}.")

    def images(self, ids: Mapping[str, int], base: Path, options: Options) -> list[BoxedImage]:
        """The images with the boxes of these classes."""
        folder, out = self._folder(base, options), []
        for image in self._images.values():
            chosen = [a for a in self._by_image[image["id"]] if self.categories[a["category_id"]] in ids]
            boxes = np.array([a["bbox"] for a in chosen], np.float64).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            labels = np.array([ids[self.categories[a["category_id"]]] for a in chosen], np.int64)
            crowd = np.array([bool(a.get("iscrowd", 0)) for a in chosen], bool)
            size = (int(image["height"]), int(image["width"])) if image.get("height") and image.get("width") else None
            name = str(image["file_name"])
            path = folder / name
            if not path.is_file():
                close = nearest(
                    Path(name).name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
                )
                hint = f"; did you mean '{close[0]}'?" if close else "; set data.options.images."
                raise UserError(f"'{self.path}' lists the image '{name}', which is not in '{folder}'{hint}")
            out.append(BoxedImage(name, partial(open_image, path), boxes, labels, crowd, size))
        return out

    def _folder(self, base: Path, options: Options) -> Path:
        """Where file names begin: the first place that has the first image."""
        base = base.parent if base.is_file() else base
        if options.images is not None:
            return base / options.images
        first = next((str(i["file_name"]) for i in self._images.values()), "")
        word = self.path.stem.removeprefix("instances_")
        places = [self.path.parent, base / word, base / "images" / word, base / "images", base]
        return next((p for p in places if (p / first).is_file()), places[0])
