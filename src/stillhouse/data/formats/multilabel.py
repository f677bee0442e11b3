"""`multilabel:PATH`: image files with any number of labels each, in a table `metadata.csv` or `labels.csv` (or .jsonl).

PATH holds train, and val and test where there are any, each with its table; or the table itself. A column `labels`
lists names (a list in JSONL; in CSV separated by `;`, `|` or `,`), of which those that are not listed are absent; or
`data.options.columns` names a column a label, with 0, 1, or nothing where nobody knows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field

from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data.bundle import DataBundle, labelled
from stillhouse.data.image_tables import ImageTable, column, split_folders
from stillhouse.data.labels import class_order
from stillhouse.data.relabelled import Relabelled
from stillhouse.data.source import IMAGENET_MEAN, IMAGENET_STD, Samples, Source, existing
from stillhouse.data.splits import Splits
from stillhouse.errors import UserError
from stillhouse.files import digest
from stillhouse.functional.counting import IGNORED
from stillhouse.tasks.multi_label import MultiLabel

__all__ = ["KEYS", "REST", "Options", "load"]
KEYS = frozenset({"image_size", "augment", "views"})
REST = "PATH"
FILES = tuple(f"{name}.{kind}" for name in ("metadata", "labels") for kind in ("csv", "jsonl"))
LABELS = ("labels", "label", "tags")
PRESENT, ABSENT, UNKNOWN = {"1", "1.0", "true"}, {"0", "0.0", "false"}, {"", "-1", "nan", "none", "null"}


class Options(Spec):
    """data.options of `multilabel:`."""

    image_column: str | None = None
    label_column: str | None = None
    columns: list[str] = Field(default_factory=list, description="A column a label, with 0, 1, or nothing.")


@dataclass
class _Part:
    """The images of a split: their names, and the names of each one's labels, or its values by column."""

    names: list[str]
    labels: list[set[str]] | np.ndarray
    item: Any


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> MultiLabelBundle:
    """The images under PATH. Without a test split, a fifth of the training images becomes one.

    Raises:
        UserError: no table, no such columns, an image that is not there, a label that no training image has.
    """
    found = {split: _read(folder, options) for split, folder in split_folders(existing(rest, root)).items()}
    classes = options.columns or class_order({n for some in found["train"].labels for n in some})
    if not classes:
        raise UserError(f"multilabel: no training image of '{spec.name}' has a label.")
    labels = {split: _ids(part, classes, f"multilabel: {split}") for split, part in found.items()}
    samples = {
        split: Samples(np.zeros(len(part.names), np.int64), digest(part.names, labels[split]), part.item)
        for split, part in found.items()
    }
    source = Source(
        samples["train"],
        ["image"],
        (3, 224, 224),
        test=samples.get("test"),
        val=samples.get("val"),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    inner = labelled(source, spec)
    task = MultiLabel(tuple(classes), inner.input_shape, inner.mean, inner.std)
    return MultiLabelBundle(spec.name, task, digest(inner.fingerprint, classes), inner.splits, inner, labels)


def _read(folder: Path, options: Options) -> _Part:
    table = ImageTable.found(folder, FILES)
    values: dict[str, Any] = {}
    for where, name, row in table.rows(options.image_column):
        if name in values:
            raise UserError(f"multilabel: {where} is the second of the image '{name}'; put its labels into one row.")
        if options.columns:
            values[name] = [_value(column(row, c, (), "columns", where), c, where) for c in options.columns]
        else:
            values[name] = _names(column(row, options.label_column, LABELS, "label_column", where))
    names = list(values)
    every: Any = list(values.values())
    return _Part(names, np.array(every, np.int64) if options.columns else every, table.images(names))


def _names(value: Any) -> set[str]:
    parts = value if isinstance(value, list) else re.split(r"[;|,]", str(value))
    return {str(p).strip() for p in parts if str(p).strip()}


def _value(value: Any, name: str, where: str) -> int:
    word = str(value).strip().lower()
    if word in PRESENT | ABSENT:
        return int(word in PRESENT)
    if word in UNKNOWN:
        return IGNORED
    raise UserError(f"multilabel: {where} has '{value}' in the column '{name}'; a label is 1, 0, or empty if unknown.")


def _ids(part: _Part, classes: list[str], where: str) -> np.ndarray:
    """(N, C) 1, 0 or -100."""
    if isinstance(part.labels, np.ndarray):
        return part.labels
    place = {name: i for i, name in enumerate(classes)}
    out = np.zeros((len(part.labels), len(classes)), np.int64)
    for row, names in zip(out, part.labels):
        strange = next((n for n in sorted(names) if n not in place), None)
        if strange is not None:
            raise UserError(f"{where}: the label '{strange}' is of no training image ({', '.join(classes[:12])}).")
        row[[place[n] for n in names]] = 1
    return out


@dataclass
class MultiLabelBundle(Splits):
    """Images with any number of labels, ready for use.

    Attributes:
        name: as in the recipe.
        task: with the names of the labels.
        fingerprint: a hash of images, labels and splits.
        splits: their names.
        inner: the images.
        labels: of each split that was read, (N, C).
    """

    name: str
    task: MultiLabel
    fingerprint: str
    splits: Any
    inner: DataBundle = field(repr=False)
    labels: dict[str, np.ndarray] = field(repr=False)

    evaluation_batch: ClassVar[int] = 256

    def dataset(self, split: str, *, train: bool) -> Relabelled:
        self.require(split)
        own = self.labels[split if split in self.labels else "train"]
        return Relabelled(self.inner.dataset(split, train=train), torch.from_numpy(own[self.inner.positions(split)]))
