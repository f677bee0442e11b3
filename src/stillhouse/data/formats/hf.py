"""`hf:REPO`: images with a class, or with boxes (a column of objects), for `datasets.load_dataset`: a repository of the
Hub, or a folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import ConfigDict, Field

from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data.box_tables import boxed_tables, has_boxes
from stillhouse.data.bundle import KEYS, DataBundle, labelled
from stillhouse.data.images import channels
from stillhouse.data.labels import whole_numbers
from stillhouse.data.parquet import DECODER, DecodedImages, cell_is_grey, decoded
from stillhouse.data.samples import SampleBundle
from stillhouse.data.sequences import sampled, source_of
from stillhouse.data.source import SMALL, Samples
from stillhouse.errors import MissingExtra, UserError, unknown
from stillhouse.files import cache_folder, digest

__all__ = ["KEYS", "REST", "Options", "load"]
REST = "REPO"


class Options(Spec):
    """data.options of `hf:`; all others go to `load_dataset`."""

    model_config = ConfigDict(extra="allow")
    image_column: str | None = Field(None, description="Default: image, img.")
    label_column: str | None = Field(None, description="Default: label, labels, fine_label.")
    train_split: str | None = Field(None, description="Default: train.")
    val_split: str | None = Field(None, description="Default: validation, val, valid.")
    test_split: str | None = Field(None, description="Default: test.")
    objects_column: str | None = Field(None, description="Of images with boxes: default: objects.")
    box_format: Literal["xywh", "xyxy"] = Field("xywh", description="What a box's four numbers are, in pixels.")
    box_classes: list[str] = Field(
        default_factory=list, description="Class names of boxes in label order; default: as the data set names them."
    )

    @property
    def splits(self) -> dict[str, str | None]:
        """The names asked for, by split."""
        return {"train": self.train_split, "val": self.val_split, "test": self.test_split}


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> DataBundle | SampleBundle:
    """Images with classes or boxes for `datasets.load_dataset`: a repository of the Hub, or a local folder.

    Raises:
        UserError: not found, or without these columns or splits. MissingExtra: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtra("hf: data sets", "text") from None
    repo = rest
    local = next((p for p in (Path(repo).expanduser(), root / repo) if p.is_dir()), None)
    try:
        found = datasets.load_dataset(str(local or repo), **(options.model_extra or {}))
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"hf:{repo} could not be loaded ({first}); check the name, the network, or name a local folder."
        ) from None
    if not isinstance(found, dict):
        found = {"train": found}
    usual = {"train": ["train"], "val": ["validation", "val", "valid"], "test": ["test"]}
    chosen: dict[str, Any] = {}
    for split, names in usual.items():
        asked = options.splits[split]
        if asked is not None and asked not in found:
            raise unknown(f"split in hf:{repo} for data.options.{split}_split,", asked, found)
        name = asked or next((n for n in names if n in found), None)
        chosen[split] = found[name] if name else None
    if chosen["train"] is None:
        raise UserError(
            f"hf:{repo} has no split 'train' (it has {', '.join(found)}); choose one with data.options.train_split."
        )
    if chosen["test"] is None:
        chosen["test"], chosen["val"] = chosen["val"], None
    features = chosen["train"].features
    image = _hf_column(features, options.image_column, ["image", "img"], "image_column", repo)
    if options.label_column is None and has_boxes(features, options.objects_column):
        tables = {split: table for split, table in chosen.items() if table is not None}
        pictures = {s: _Column.of(table, image, f"hf:{repo} ({s})") for s, table in tables.items()}
        return boxed_tables(tables, lambda split, row: pictures[split].item(row), options, spec)
    label = _hf_column(features, options.label_column, ["label", "labels", "fine_label"], "label_column", repo)
    columns = {
        split: _Column.of(table, image, f"hf:{repo} ({split})") for split, table in chosen.items() if table is not None
    }
    samples = {split: column.samples(chosen[split], label) for split, column in columns.items()}
    depth = None
    if columns["train"].encoded:
        size = columns["train"].item(0).size
        depth = channels(grey for column in columns.values() for grey in column.grey())
        if max(size) <= SMALL:
            for split, column in columns.items():
                column.decode_once(samples[split], (depth, size[1], size[0]))
    found_source = source_of(samples, getattr(features[label], "names", None), f"hf:{repo}", depth=depth)
    return labelled(found_source, spec)


def _hf_column(features: Any, asked: str | None, usual: list[str], option: str, repo: str) -> str:
    chosen = asked or next((n for n in usual if n in features), None)
    if chosen is None or chosen not in features:
        raise UserError(
            f"hf:{repo} has no column '{chosen or usual[0]}' (it has {', '.join(features)}); name it with "
            f"data.options.{option}."
        )
    return chosen


@dataclass
class _Column:
    """The inputs of a Hugging Face data set; images are decoded here, not by `datasets`, which opens any format."""

    table: Any
    name: str
    what: str
    identity: str
    encoded: bool  # bytes, or {bytes, path}

    @classmethod
    def of(cls, table: Any, name: str, what: str) -> _Column:
        import datasets

        identity = table._fingerprint
        table = table.select_columns([name])
        if isinstance(table.features[name], datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
        first = table[0][name] if len(table) else None
        encoded = isinstance(first, bytes) or (isinstance(first, dict) and {"bytes", "path"} >= first.keys())
        return cls(table, name, what, identity, encoded)

    def item(self, position: int) -> Any:
        cell = self.table[int(position)][self.name]
        return decoded(cell, self._where(int(position))) if self.encoded else cell

    def read(self, positions: np.ndarray) -> Iterator[Image.Image]:
        return (self.item(p) for p in positions)

    def grey(self) -> Iterator[bool]:
        """Whether each image is grey, one after the other; looks at headers alone."""
        for start in range(0, len(self.table), 1000):
            for i, cell in enumerate(self.table[start : start + 1000][self.name], start):
                yield cell_is_grey(cell, self._where(i))

    def samples(self, table: Any, label: str) -> Samples:
        return sampled(whole_numbers(list(table[label]), self.what), self.item)

    def decode_once(self, samples: Samples, shape: tuple[int, ...]) -> None:
        """Small images are kept in memory."""
        samples.pixels = DecodedImages(
            self.read, len(samples), shape, cache_folder() / "images" / digest(DECODER, self.identity, self.name)
        )

    def _where(self, position: int) -> str:
        return f"in row {position} of {self.what}"
