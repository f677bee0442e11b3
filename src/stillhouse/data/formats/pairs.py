"""`pairs:PATH`: image files with captions in a CSV or JSONL file, `metadata.csv` or `captions.jsonl`, as Hugging Face's
imagefolder has them.

PATH holds train, and val and test where there are any, each with its file; or the file itself.
"""

from __future__ import annotations

from pathlib import Path

from stillhouse.config.specs import DataSpec
from stillhouse.data.captioned import KEYS, CaptionedImages, CaptionedOptions, captioned
from stillhouse.data.image_tables import ImageTable, column, split_folders
from stillhouse.data.image_text import ImageTextBundle
from stillhouse.data.source import existing

__all__ = ["KEYS", "REST", "Options", "load"]
REST = "PATH"
FILES = tuple(f"{name}.{kind}" for name in ("metadata", "captions") for kind in ("csv", "jsonl"))
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
    folders = split_folders(existing(rest, root))
    return captioned({s: _read(f, options) for s, f in folders.items()}, spec, options, root)


def _read(folder: Path, options: Options) -> CaptionedImages:
    """All images that a folder's caption file names, in its order; one that stands there several times has several
    captions."""
    table = ImageTable.found(folder, FILES)
    captions: dict[str, list[str]] = {}
    for where, name, row in table.rows(options.image_column):
        text = column(row, options.text_column, TEXT, "text_column", where)
        captions.setdefault(name, []).extend(map(str, text if isinstance(text, list) else [text]))
    names = list(captions)
    return CaptionedImages(names, list(captions.values()), table.images(names))
