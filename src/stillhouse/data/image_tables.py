"""Image files with what is known of them in a table next to them, CSV or JSONL, as Hugging Face's imagefolder has
`metadata.csv`."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from stillhouse.data.images import open_image
from stillhouse.errors import UserError

IMAGE = ("file_name", "image", "file", "path")
Row = Mapping[str, Any]


def split_folders(base: Path) -> dict[str, Path]:
    """The folders train, val and test of a data set, as far as they are there; without train, all of it is that."""
    folders = {s: base / s for s in ("train", "val", "test") if (base / s).is_dir()}
    return folders if "train" in folders else {"train": base}


@dataclass
class ImageTable:
    """A table of a folder's images.

    Attributes:
        file: CSV with a head line, or JSONL.
        folder: that its names of images are relative to.
    """

    file: Path
    folder: Path

    @classmethod
    def found(cls, folder: Path, names: Sequence[str]) -> ImageTable:
        """The first of these files in a folder. Raises `UserError` where none is there."""
        file = next((folder / name for name in names if (folder / name).is_file()), None)
        if file is None:
            raise UserError(f"'{folder}' holds no table of its images ({', '.join(names)}).")
        return cls(file, folder)

    def rows(self, image_column: str | None = None) -> Iterator[tuple[str, str, Row]]:
        """(what messages call the row, the image's name, the row). Raises `UserError` for a file that cannot be read,
        or a row without an image."""
        for number, row in enumerate(self._read(), 1):
            where = f"row {number} of '{self.file}'"
            yield where, str(column(row, image_column, IMAGE, "image_column", where)), row

    def _read(self) -> Iterator[Row]:
        with open(self.file, encoding="utf-8-sig", newline="") as lines:
            if self.file.suffix == ".csv":
                yield from csv.DictReader(lines)
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        value = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise UserError(f"Line {number} of '{self.file}' is not JSON ({error.msg}).") from None
                    if not isinstance(value, dict):
                        raise UserError(f"Line {number} of '{self.file}' is no object with keys and values.")
                    yield value

    def images(self, names: Sequence[str]) -> Callable[[int], Image.Image]:
        """Position -> image, in RGB. Raises `UserError` for a name without a file, at once."""
        missing = next((n for n in names if not (self.folder / n).is_file()), None)
        if missing is not None:
            raise UserError(f"'{self.file}' names the image '{missing}', which is not in '{self.folder}'.")
        return _Opened(self.folder, list(names)).item


@dataclass
class _Opened:
    folder: Path
    names: list[str]

    def item(self, position: int) -> Image.Image:
        return open_image(self.folder / self.names[position]).convert("RGB")


def column(row: Row, asked: str | None, usual: Sequence[str], option: str, where: str) -> Any:
    """A row's value: of the column that was asked for, or of the first usual one that is there. Raises `UserError` for
    a row without."""
    name = asked or next((n for n in usual if n in row), None)
    if name is None or row.get(name) is None:
        raise UserError(
            f"{where} has no '{name or usual[0]}' (it has {', '.join(map(str, row))}); name the column with "
            f"data.options.{option}."
        )
    return row[name]
