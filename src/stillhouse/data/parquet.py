"""Images in Parquet files (a column of encoded images, a column of labels), and the cache of decoded small images that later starts read.

Cached arrays are written beside and renamed, so two processes may fill the cache at once.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stillhouse.config.specs import DataSpec
from stillhouse.data.source import IMAGENET_MEAN, IMAGENET_STD, SMALL, Samples, Source, existing
from stillhouse.errors import UserError, unknown
from stillhouse.files import cache_folder, digest

SPLIT_NAMES = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}


def parquet(path: str, spec: DataSpec, root: Path) -> Source:
    """A Parquet file, or a folder of them whose names (or folders) begin with train, test or val.

    Options: `image_column` (default: img, image), `label_column` (default: label, labels, fine_label).
    """
    wrong = set(spec.options) - {"image_column", "label_column"}
    if wrong:
        raise unknown("option of parquet:", sorted(wrong)[0], ["image_column", "label_column"])
    return read_splits(existing(path, root), spec.options.get("image_column"), spec.options.get("label_column"))


def read_splits(path: Path, image_column: str | None, label_column: str | None) -> Source:
    """The splits of a Parquet file or folder. Raises `UserError` for no files, or a column that is not there."""
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"parquet: the folder '{path}' holds no .parquet files.")
    groups: dict[str, list[Path]] = {}
    for file in files:
        words = [re.split(r"[-_.]", part.lower())[0] for part in file.relative_to(path if path.is_dir() else path.parent).parts[::-1]]
        groups.setdefault(next((SPLIT_NAMES[w] for w in words if w in SPLIT_NAMES), "train"), []).append(file)
    if "train" not in groups:
        raise UserError(f"parquet: '{path}' holds no training files; one must begin with 'train'.")
    if "test" not in groups and "val" in groups:
        groups["test"] = groups.pop("val")
    tables = {split: _Table.open(members, image_column, label_column) for split, members in groups.items()}
    head = tables["train"]
    for table in tables.values():
        table.number_like(head)
    splits = {split: table.samples() for split, table in tables.items()}
    classes = head.classes or [str(i) for i in range(max(int(s.labels.max(initial=0)) for s in splits.values()) + 1)]
    if splits["train"].pixels:
        return Source(splits["train"], classes, head.shape, test=splits.get("test"), val=splits.get("val"))
    return Source(splits["train"], classes, (3, 224, 224), test=splits.get("test"), val=splits.get("val"), mean=IMAGENET_MEAN, std=IMAGENET_STD)


@dataclass
class _Table:
    """One split: what is known of it without decoding."""

    files: list[str]
    column: str
    labels: np.ndarray
    classes: list[str]
    shape: tuple[int, ...]  # of the first image
    cache: Path
    _encoded: Any = None

    @classmethod
    def open(cls, files: list[Path], image_column: str | None, label_column: str | None) -> _Table:
        stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        cache = cache_folder() / "images" / digest(stats, image_column, label_column)
        head = _from_cache(cache / "head.npz")
        if head is None:
            head = _read_head([str(f) for f in files], image_column, label_column)
            _to_cache(cache / "head.npz", lambda out: np.savez(out, **head))
        facts = json.loads(str(head["facts"]))
        return cls([str(f) for f in files], facts["column"], head["labels"], facts["classes"], tuple(facts["shape"]), cache)

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
        return Samples(self.labels, identity, self.item, DecodedImages(self.read, len(self.labels), self.shape, self.cache) if small else None)

    def item(self, position: int) -> Image.Image:
        return next(self.read(np.array([position])))

    def read(self, positions: np.ndarray) -> Iterator[Image.Image]:
        """The images at these positions, decoded one by one."""
        encoded = self._read_encoded()
        for position in positions.tolist():
            yield _decode(encoded[position].as_py(), f"row {position} of {', '.join(self.files)}")

    def _read_encoded(self) -> Any:
        if self._encoded is None:
            import pyarrow.parquet as pq

            self._encoded = pq.ParquetDataset(self.files).read(columns=[self.column]).column(self.column)
        return self._encoded

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoded": None}


def _read_head(files: list[str], image_column: str | None, label_column: str | None) -> dict[str, Any]:
    """Labels, class names, and the first image's shape."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(files[0])
        image = _column(schema.names, image_column, ["img", "image"], files[0], "image_column")
        label = _column(schema.names, label_column, ["label", "labels", "fine_label"], files[0], "label_column")
        column = pq.ParquetDataset(files).read(columns=[label]).column(label)
        first = next(pq.ParquetFile(files[0]).iter_batches(batch_size=1, columns=[image]), None)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"parquet: cannot read '{files[0]}' ({error}).") from None
    if first is None or not len(column):
        raise UserError(f"parquet: '{files[0]}' holds no samples.")
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    classes = features.get(label, {}).get("names") or []
    if pa.types.is_integer(column.type):
        labels = column.to_numpy().astype(np.int64)
    else:
        classes, labels = np.unique([str(v) for v in column.to_pylist()], return_inverse=True)
        classes = classes.tolist()
    picture = _decode(first.column(0)[0].as_py(), f"row 0 of {files[0]}")
    shape = (1 if picture.mode in ("1", "L") else 3, picture.height, picture.width)
    return {"labels": labels, "facts": np.array(json.dumps({"column": image, "classes": classes, "shape": shape}))}


def _column(names: list[str], asked: str | None, usual: list[str], file: str, option: str) -> str:
    chosen = asked or next((n for n in usual if n in names), None)
    if chosen not in names:
        error = unknown("column", chosen or usual[0], names)
        raise UserError(f"parquet: '{file}': {str(error)[0].lower()}{str(error)[1:]} Name it with data.options.{option}.")
    return chosen


def _decode(value: Any, where: str) -> Image.Image:
    """An image from its encoded bytes, or from Hugging Face's {bytes, path}."""
    data = value.get("bytes") if isinstance(value, dict) else value
    try:
        image = Image.open(io.BytesIO(data or b""))
        image.load()
        return image
    except (OSError, SyntaxError, TypeError, ValueError) as error:
        raise UserError(f"Cannot read the image in {where} ({error}).") from None


@dataclass
class DecodedImages:
    """Small images as uint8 arrays, decoded once and kept in the cache: the whole set, or only the subset asked for where that is under half.

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
                    f"Image {positions[row]} is {image.width}x{image.height} pixels, but the first is {width}x{height}; small images must be of one size."
                )
            out[row] = np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(height, width, channels)
        return np.ascontiguousarray(out.transpose(0, 3, 1, 2))


def _from_cache(path: Path) -> Any:
    """An array file, mapped into memory (pages are shared between processes), or None."""
    try:
        return np.load(path, mmap_mode="c" if path.suffix == ".npy" else None, allow_pickle=False)
    except (OSError, ValueError):
        return None


def _to_cache(path: Path, write: Callable[[Any], None]) -> None:
    """Write beside and rename; a cache that cannot be written is only slower."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as out:
            write(out)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
