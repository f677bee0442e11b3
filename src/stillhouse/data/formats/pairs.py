"""`pairs:PATH`: image files with captions in a CSV or JSONL file, `metadata.csv` or `captions.jsonl`, as Hugging Face's
imagefolder has them.

PATH holds train, and val and test where there are any, each with its file; or the file itself.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from stillhouse.config.specs import DataSpec
from stillhouse.data.captioned import KEYS, CaptionedImages, CaptionedOptions, captioned
from stillhouse.data.image_text import ImageTextBundle
from stillhouse.data.images import open_image
from stillhouse.data.source import existing
from stillhouse.errors import UserError

__all__ = ["KEYS", "REST", "Options", "load"]
REST = "PATH"
FILES = tuple(f"{name}.{kind}" for name in ("metadata", "captions") for kind in ("csv", "jsonl"))
IMAGE = ("file_name", "image", "file", "path")
TEXT = ("text", "caption", "captions", "texts")


class Options(CaptionedOptions):
    """data.options of `pairs:`."""

    image_column: str | None = None
    text_column: str | None = None


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> ImageTextBundle:
    """The captioned images under PATH.

    Raises:
        UserError: no caption file, no such columns, an image that is not there, or what `captioned` raises.
    """
    base = existing(rest, root)
    folders = {s: base / s for s in ("train", "val", "test") if (base / s).is_dir()}
    folders = folders if "train" in folders else {"train": base}
    return captioned({s: _read(f, options) for s, f in folders.items()}, spec, options, root)


def _read(folder: Path, options: Options) -> CaptionedImages:
    """All images that a folder's caption file names, in its order; one that stands there several times has several
    captions."""
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"pairs: '{folder}' holds no file of captions ({', '.join(FILES)}).")
    captions: dict[str, list[str]] = {}
    for number, row in enumerate(_rows(file), 1):
        where = f"row {number} of '{file}'"
        name = str(_value(row, options.image_column, IMAGE, "image_column", where))
        text = _value(row, options.text_column, TEXT, "text_column", where)
        captions.setdefault(name, []).extend(map(str, text if isinstance(text, list) else [text]))
    names = list(captions)
    missing = next((n for n in names if not (folder / n).is_file()), None)
    if missing is not None:
        raise UserError(f"pairs: '{file}' names the image '{missing}', which is not in '{folder}'.")
    return CaptionedImages(names, list(captions.values()), _Files(folder, names).item)


class _Files:
    def __init__(self, folder: Path, names: list[str]) -> None:
        self._folder, self._names = folder, names

    def item(self, position: int) -> Image.Image:
        return open_image(self._folder / self._names[position]).convert("RGB")


def _rows(file: Path) -> Iterator[Mapping[str, Any]]:
    with open(file, encoding="utf-8", newline="") as lines:
        if file.suffix == ".csv":
            yield from csv.DictReader(lines)
            return
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    value = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"pairs: line {number} of '{file}' is not JSON ({error.msg}).") from None
                if not isinstance(value, dict):
                    raise UserError(f"pairs: line {number} of '{file}' is no object with keys and values.")
                yield value


def _value(row: Mapping[str, Any], asked: str | None, usual: tuple[str, ...], option: str, where: str) -> Any:
    name = asked or next((n for n in usual if n in row), None)
    if name is None or row.get(name) is None:
        raise UserError(
            f"pairs: {where} has no '{name or usual[0]}' (it has {', '.join(map(str, row))}); name the column with "
            f"data.options.{option}."
        )
    return row[name]
