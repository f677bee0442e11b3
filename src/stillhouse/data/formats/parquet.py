"""`parquet:PATH`: a Parquet file, or a folder of them whose names (or folders) begin with train, test or val."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data.bundle import KEYS, DataBundle, labelled
from stillhouse.data.parquet import read_splits
from stillhouse.data.source import existing

__all__ = ["KEYS", "REST", "Options", "load"]
REST = "PATH"


class Options(Spec):
    """data.options of `parquet:`."""

    image_column: str | None = Field(None, description="Default: img, image.")
    label_column: str | None = Field(None, description="Default: label, labels, fine_label.")


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> DataBundle:
    """The images of the files as a bundle. Raises `UserError` for no files, or a column that is not there."""
    return labelled(read_splits(existing(rest, root), options.image_column, options.label_column), spec)
