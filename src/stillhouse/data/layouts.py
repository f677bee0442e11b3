"""Folders whose labels are boxes or masks (Pascal VOC, COCO, YOLO, masks next to images), recognised so that they are
not read as folders of classes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from stillhouse.data.images import EXTENSIONS, is_system
from stillhouse.errors import UserError

IMAGES = {"images", "image", "imgs", "img", "image_2", "leftimg8bit", "rgb"}
LABELS = {
    "labels",
    "label",
    "label_2",
    "masks",
    "mask",
    "annotations",
    "annotation",
    "annots",
    "gt",
    "gtfine",
    "groundtruth",
    "ground_truth",
}
DEEP = 3  # levels of folders that are looked at, as in VOCtrainval/VOCdevkit/VOC2012
FOLDERS, ENTRIES, FILES = 300, 10_000, 64  # looked at: folders in all, entries of a folder, files whose endings count


def refuse_other_layouts(folder: Path) -> None:
    """Raise `UserError`, saying what the folder is, where it is no folder of classes."""
    for place in _folders(folder):
        kind = _kind(place)
        if kind is not None:
            masks = f" To train on its masks, use data.name: masks:{folder}." if "segmentation" in kind else ""
            scheme = next((s for s, word in (("voc", "VOC"), ("coco", "COCO")) if word in kind), None)
            masks = f" To train on its boxes, use data.name: {scheme}:{place}." if scheme else masks
            raise UserError(
                f"imagefolder: '{place}' is {kind}; read as classes, its folders would be what is learned.{masks} "
                "To classify its images, copy them into a folder for each class (train/CLASS/*.jpg)."
            )


def _folders(folder: Path) -> Iterator[Path]:
    """The folder, and those below it, level by level."""
    level, seen = [folder], 0
    for _ in range(DEEP + 1):
        below: list[Path] = []
        for place in level:
            if seen == FOLDERS:
                return
            seen += 1
            yield place
            below += sorted(Path(e.path) for e in _entries(place) if e.is_dir() and not is_system(e.name))
        level = below


def _kind(folder: Path) -> str | None:
    """What a folder is, in words, if it is no folder of classes."""
    entries = _entries(folder)
    inside = {e.name.lower(): e.path for e in entries if e.is_dir()}
    if "jpegimages" in inside and inside.keys() & {"annotations", "imagesets", "segmentationclass"}:
        return "a Pascal VOC data set (boxes or masks: Annotations, ImageSets, JPEGImages)"
    if any(e.name.lower().endswith(".coco.json") for e in entries) or (
        "annotations" in inside and _holds(inside["annotations"], (".json",))
    ):
        return "a COCO data set (boxes: a JSON file of annotations)"
    for split in ("train", "val", "test"):
        if split in inside and inside.keys() & {f"{split}annot", f"{split}_masks", f"{split}_labels"}:
            return f"a data set for segmentation ('{split}' with masks next to it)"
    images = next(iter(sorted(IMAGES & inside.keys())), None)
    for name in sorted(LABELS & inside.keys()) if images is not None else []:
        if _holds(inside[name], EXTENSIONS):
            return f"a data set for segmentation ('{images}' with masks in '{name}')"
        if _holds(inside[name], (".txt",)):
            return "a YOLO data set (boxes: a text file for each image)"
        if _holds(inside[name], (".xml", ".json")):
            return "a data set of boxes or outlines (a file for each image)"
    return None


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [e for e, _ in zip(entries, range(ENTRIES))]


def _holds(folder: str, suffixes: tuple[str, ...], depth: int = 2) -> bool:
    """Whether there are such files in a folder, or in folders below it (as a folder for each split or city)."""
    entries = _entries(folder)[:FILES]
    if any(e.name.lower().endswith(suffixes) and not is_system(e.name) for e in entries):
        return True
    return depth > 0 and any(_holds(e.path, suffixes, depth - 1) for e in entries if e.is_dir())
