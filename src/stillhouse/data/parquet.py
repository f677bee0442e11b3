"""Images in Parquet files (a column of encoded images, a column of labels), and the cache of decoded small images that
later starts read.

Cached arrays are written under another name and renamed, so two processes may fill the cache at once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stillhouse.data.images import as_channels, channels, is_grey, is_system, open_image
from stillhouse.data.labels import class_order, ids_of, read_labels, unnamed
from stillhouse.data.source import IMAGENET_MEAN, IMAGENET_STD, SMALL, Samples, Source
from stillhouse.errors import UserError, unknown
from stillhouse.files import cache_folder, digest

DECODER = 2  # counts up where decoded pixels change, so that no older cache is read
SPLIT_NAMES = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}


def read_splits(path: Path, image_column: str | None, label_column: str | None) -> Source:
    """The splits of a Parquet file or folder. Raises `UserError` for no files, or a column that is not there."""
    files = (
        sorted(f for f in path.rglob("*.parquet") if not any(map(is_system, f.relative_to(path).parts)))
        if path.is_dir()
        else [path]
    )
    if not files:
        raise UserError(f"parquet: the folder '{path}' holds no .parquet files.")
    groups: dict[str, list[Path]] = {}
    for file in files:
        words = [
            re.split(r"[-_.]", part.lower())[0]
            for part in file.relative_to(path if path.is_dir() else path.parent).parts[::-1]
        ]
        groups.setdefault(next((SPLIT_NAMES[w] for w in words if w in SPLIT_NAMES), "train"), []).append(file)
    if "train" not in groups:
        raise UserError(f"parquet: '{path}' holds no training files; one must begin with 'train'.")
    if "test" not in groups and "val" in groups:
        groups["test"] = groups.pop("val")
    tables = {split: _Table.open(members, image_column, label_column) for split, members in groups.items()}
    head, depth = tables["train"], max(table.shape[0] for table in tables.values())
    for table in tables.values():
        table.number_like(head)
        table.shape = (depth, *table.shape[1:])
    splits = {split: table.samples() for split, table in tables.items()}
    classes = head.classes or unnamed([s.labels for s in splits.values()], f"parquet: '{path}'")
    if splits["train"].pixels:
        return Source(splits["train"], classes, head.shape, test=splits.get("test"), val=splits.get("val"))
    return Source(
        splits["train"],
        classes,
        (3, 224, 224),
        test=splits.get("test"),
        val=splits.get("val"),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


@dataclass
class _Table:
    """One split: what is known of it without decoding."""

    files: list[str]
    column: str
    labels: np.ndarray
    classes: list[str]
    shape: tuple[int, ...]  # of the first image; 3 channels if any image is in colour
    cache: Path
    _encoded: Any = None

    @classmethod
    def open(cls, files: list[Path], image_column: str | None, label_column: str | None) -> _Table:
        stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        cache = cache_folder() / "images" / digest(DECODER, stats, image_column, label_column)
        head = _from_cache(cache / "head.npz")
        if head is None:
            head = _read_head([str(f) for f in files], image_column, label_column)
            _to_cache(cache / "head.npz", lambda out: np.savez(out, **head))
        facts = json.loads(str(head["facts"]))
        return cls(
            [str(f) for f in files], facts["column"], head["labels"], facts["classes"], tuple(facts["shape"]), cache
        )

    def number_like(self, head: _Table) -> None:
        """Number the classes as the training split does, where labels are words and a split lacks some."""
        if self.classes != head.classes:
            wrong = [c for c in self.classes if c not in head.classes]
            if wrong:
                raise unknown("class in the training split that is called", wrong[0], head.classes)
            self.labels = np.array([head.classes.index(c) for c in self.classes], dtype=np.int64)[self.labels]

    def samples(self) -> Samples:
        identity = digest([(Path(f).name, os.path.getsize(f)) for f in self.files], self.labels)
        small = max(self.shape[1:]) <= SMALL
        if not small:
            self._read_encoded()  # before workers fork, which then share it
        return Samples(
            self.labels,
            identity,
            self.item,
            DecodedImages(self.read, len(self.labels), self.shape, self.cache) if small else None,
        )

    def item(self, position: int) -> Image.Image:
        return next(self.read(np.array([position])))

    def read(self, positions: np.ndarray) -> Iterator[Image.Image]:
        """The images at these positions, decoded one by one."""
        encoded = self._read_encoded()
        for position in positions.tolist():
            yield decoded(encoded[position].as_py(), f"in row {position} of {', '.join(self.files)}")

    def _read_encoded(self) -> Any:
        if self._encoded is None:
            self._encoded = read_columns(self.files, [self.column]).column(self.column)
        return self._encoded

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoded": None}


def _read_head(files: list[str], image_column: str | None, label_column: str | None) -> dict[str, Any]:
    """Labels, class names, and the first image's shape."""
    schema = read_schema(files[0])
    image = _column(schema.names, image_column, ["img", "image"], files[0], "image_column")
    label = _column(schema.names, label_column, ["label", "labels", "fine_label"], files[0], "label_column")
    column = read_columns(files, [label]).column(label)
    if not len(column):
        raise UserError(f"parquet: '{files[0]}' holds no samples.")
    classes = class_names(schema, label) or []
    labels, classes = _numbered(column, classes, f"parquet: '{files[0]}'")
    encoded = _cells(files, image)
    first = next(encoded)
    picture = decoded(first, f"in row 0 of {files[0]}")
    depth = channels(
        cell_is_grey(c, f"in row {i} of {', '.join(files)}") for i, c in enumerate(chain([first], encoded))
    )
    facts = {"column": image, "classes": classes, "shape": (depth, picture.height, picture.width)}
    return {"labels": labels, "facts": np.array(json.dumps(facts))}


def _numbered(column: Any, classes: list[str], where: str) -> tuple[np.ndarray, list[str]]:
    """Class ids, and the names that go with them where there are any."""
    import pyarrow as pa

    if pa.types.is_integer(column.type) and not column.null_count:
        return column.to_numpy().astype(np.int64), classes
    labels = read_labels(column.to_pylist(), where)
    if all(isinstance(v, int) and not isinstance(v, bool) for v in labels):
        return np.array(labels, np.int64), classes
    classes = classes or class_order(map(str, labels))
    return ids_of(labels, classes, where), classes


def read_schema(file: str) -> Any:
    """The columns of a Parquet file. Raises `UserError` for a file that is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"parquet: cannot read '{file}' ({error}).") from None


def class_names(schema: Any, column: str) -> list[str] | None:
    """The names of a ClassLabel, as Hugging Face's `datasets` writes them into a file."""
    try:
        names = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return [str(n) for n in names] if isinstance(names, list) else None


def read_columns(files: Sequence[str], columns: Sequence[str] | None = None) -> Any:
    """Columns of Parquet files (default: all) as a table in memory.

    Raises:
        UserError: a file that cannot be read, or one that holds more than half of the machine's memory: a small file
            may, as equal rows take no space.
    """
    import pyarrow as pa

    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    batches = []
    for file in files:
        for batch in _batches(file, columns):
            room -= batch.nbytes
            if room < 0:
                raise UserError(
                    f"parquet: '{file}' holds more than half of this machine's memory; take fewer rows, or image "
                    "files in folders."
                )
            batches.append(batch)
    return pa.Table.from_batches(batches) if batches else read_schema(files[0]).empty_table().select(columns or [])


def _batches(file: str, columns: Sequence[str] | None, rows: int = 1024) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        yield from pq.ParquetFile(file).iter_batches(
            batch_size=rows, columns=None if columns is None else list(columns)
        )
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(f"parquet: cannot read '{file}' ({error}).") from None


def _cells(files: Sequence[str], column: str) -> Iterator[Any]:
    """The values of a column, one by one."""
    return (cell.as_py() for file in files for batch in _batches(file, [column], 64) for cell in batch.column(0))


def _column(names: list[str], asked: str | None, usual: list[str], file: str, option: str) -> str:
    chosen = asked or next((n for n in usual if n in names), None)
    if chosen not in names:
        error = unknown("column", chosen or usual[0], names)
        raise UserError(
            f"parquet: '{file}': {str(error)[0].lower()}{str(error)[1:]} Name it with data.options.{option}."
        )
    return chosen


def decoded(cell: Any, where: str) -> Image.Image:
    """The image of a cell: its encoded bytes, or Hugging Face's {bytes, path}."""
    return open_image(_encoded(cell, where), where)


def cell_is_grey(cell: Any, where: str) -> bool:
    """Whether the image of a cell is grey, without decoding it."""
    return is_grey(_encoded(cell, where), where)


def _encoded(cell: Any, where: str) -> bytes | str:
    value = (cell.get("bytes") or cell.get("path")) if isinstance(cell, dict) else cell
    if not isinstance(value, bytes | str) or not value:
        given = "nothing" if not value else f"a {type(value).__name__}"
        raise UserError(
            f"Cannot read the image {where}: encoded bytes, or {{bytes, path}}, are expected; the cell holds {given}."
        )
    return value


@dataclass
class DecodedImages:
    """Small images as uint8 arrays, decoded once and kept in the cache: the whole set, or only the subset asked for
    where that is under half.

    Args:
        read: images by position.
        count: images in the whole set.
        shape: (C, H, W) of every image.
        cache: folder of the arrays.
    """

    read: Callable[[np.ndarray], Iterator[Image.Image]]
    count: int
    shape: tuple[int, ...]
    cache: Path

    def __call__(self, positions: np.ndarray) -> Tensor:
        """uint8 (n, C, H, W). Raises `UserError` for an image of another size."""
        every = len(positions) * 2 > self.count
        part = self.cache / f"{digest(positions)}.npy"
        whole = _from_cache(self.cache / "all.npy")
        images = whole if whole is not None or every else _from_cache(part)
        if images is None:
            images = self._decode(np.arange(self.count) if every else positions)
            _to_cache(self.cache / "all.npy" if every else part, lambda out: np.save(out, images))
        if len(images) == len(positions):
            return torch.from_numpy(images)
        return torch.from_numpy(images[positions])

    def _decode(self, positions: np.ndarray) -> np.ndarray:
        channels, height, width = self.shape
        out = np.empty((len(positions), height, width, channels), dtype=np.uint8)
        for row, image in enumerate(self.read(positions)):
            if image.size != (width, height):
                raise UserError(
                    f"Image {positions[row]} is {image.width}x{image.height} pixels, but the first is "
                    f"{width}x{height}; small images must be of one size."
                )
            out[row] = np.asarray(as_channels(image, channels, f"Image {positions[row]}")).reshape(
                height, width, channels
            )
        return np.ascontiguousarray(out.transpose(0, 3, 1, 2))


def _from_cache(path: Path) -> Any:
    """An array file, mapped into memory (pages are shared between processes), or None."""
    try:
        return np.load(path, mmap_mode="c" if path.suffix == ".npy" else None, allow_pickle=False)
    except (OSError, ValueError):
        return None


def _to_cache(path: Path, write: Callable[[Any], None]) -> None:
    """Write under another name and rename; a cache that cannot be written is only slower."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as out:
            write(out)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
