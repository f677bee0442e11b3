"""Tables of Hugging Face `datasets` whose rows hold an image and a column of objects with boxes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from stillhouse.config.specs import DataSpec
from stillhouse.data.boxes import BoxedImage, boxed, class_ids
from stillhouse.data.samples import SampleBundle
from stillhouse.errors import UserError, unknown

BOX, CLASS = ("bbox", "bboxes", "box", "boxes"), ("category", "categories", "label", "labels", "category_id")
COLUMN = "objects"


def has_boxes(features: Mapping[str, Any], column: str | None) -> bool:
    """Whether a table's columns hold boxes."""
    return (column or COLUMN) in features


def boxed_tables(
    tables: Mapping[str, Any], opener: Callable[[str, int], Any], options: Any, spec: DataSpec
) -> SampleBundle:
    """Tables by split as a bundle.

    Args:
        tables: train, and val and test where there are such.
        opener: decodes the image of a split's row.
        options: of `hf:`, of which `objects_column`, `box_format` and `box_classes` are read.
        spec: the recipe's `data`.

    Raises:
        UserError: no boxes or classes in the column of objects, class ids without names, and what
            `stillhouse.data.boxes.boxed` raises.
    """
    column = options.objects_column or COLUMN
    features = tables["train"].features
    if column not in features:
        raise unknown(f"column of {spec.name} for data.options.objects_column", column, features)
    feature = features[column]
    inner = getattr(feature, "feature", feature)
    box = _field(inner, BOX, column, spec)
    kind = _field(inner, CLASS, column, spec)
    leaf = inner[kind]
    while hasattr(leaf, "feature"):
        leaf = leaf.feature
    given = getattr(leaf, "names", None)
    rows = {s: [_columns(v, box, kind) for v in table[column]] for s, table in tables.items()}
    occur = [c for part in rows.values() for _, classes in part for c in classes]
    if given is None and occur and not isinstance(occur[0], str):
        names = options.box_classes
        if not names or max(occur) >= len(names):
            raise UserError(
                f"'{spec.name}' names classes by number only, up to {max(occur)}; name them all in "
                "data.options.box_classes."
            )
    else:
        names = options.box_classes or given or sorted(set(occur))
    ids = class_ids((), names, spec.name)
    by_number = given or names
    for wanted in options.box_classes:
        if wanted not in (given or occur) and isinstance(next(iter(occur), ""), str):
            raise unknown("class for data.options.box_classes", wanted, sorted(set(given or occur)))
    splits = {}
    for split, part in rows.items():
        table, images = tables[split], []
        known: list[tuple[int, int] | None] = [None] * len(part)
        if {"height", "width"} <= set(table.features):
            known = [(int(h), int(w)) for h, w in zip(table["height"], table["width"])]
        for i, (boxes, classes) in enumerate(part):
            names_of = [c if isinstance(c, str) else by_number[c] for c in classes]
            chosen = [n for n, name in enumerate(names_of) if name in ids]
            corners = np.array(boxes, np.float64).reshape(-1, 4)[chosen]
            if options.box_format == "xywh":
                corners[:, 2:] += corners[:, :2]
            labels = np.array([ids[names_of[n]] for n in chosen], np.int64)
            name = f"{split} {i}"
            size = known[i]
            images.append(
                BoxedImage(name, partial(opener, split, i), corners, labels, np.zeros(len(chosen), bool), size)
            )
        splits[split] = images
    return boxed(splits, list(ids), spec, [t._fingerprint for t in tables.values()])


def _field(inner: Any, wanted: tuple[str, ...], column: str, spec: DataSpec) -> str:
    found = next((name for name in wanted if name in inner), None)
    if found is None:
        raise UserError(
            f"The column '{column}' of '{spec.name}' holds {', '.join(inner)}, but none of {', '.join(wanted)}."
        )
    return found


def _columns(value: Any, box: str, kind: str) -> tuple[list[Any], list[Any]]:
    """Boxes and classes of a row: of a mapping of lists, or a list of mappings."""
    if isinstance(value, Mapping):
        return list(value[box]), list(value[kind])
    return [o[box] for o in value], [o[kind] for o in value]
