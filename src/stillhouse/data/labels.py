"""Labels as sources hold them, read as one class a sample: what is absent, real-valued or a list is refused, not made
into classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
from torch import Tensor

from stillhouse.errors import UserError

INTEGER = re.compile(r"[+-]?[0-9]+")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
MOST_UNNAMED = 100_000


def read_labels(values: Any, where: str) -> list[int | str]:
    """One whole number or word a sample. Real numbers that are whole (1.0) become whole numbers, also where they are
    written as text.

    Args:
        values: a tensor, an array, or any sequence.
        where: what messages call the samples, such as `'a.csv'`.

    Raises:
        UserError: a sample without a label, with a real number, or with several labels.
    """
    read = [_plain(v) for v in (values.tolist() if isinstance(values, Tensor | np.ndarray) else values)]
    present = [v for v in read if v is not None]
    numbers = all(isinstance(v, str) and NUMBER.fullmatch(v) for v in present)
    if numbers and not all(INTEGER.fullmatch(v) for v in present):
        read = [v if v is None else _plain(float(v)) for v in read]
    absent = [i for i, v in enumerate(read) if v is None]
    if absent:
        raise UserError(
            f"{where}: sample {absent[0]} has no label ({len(absent)} of {len(read)} have none); label them or leave "
            "them out."
        )
    out: list[int | str] = []
    for number, value in enumerate(read):
        if isinstance(value, float):
            raise UserError(
                f"{where}: the label of sample {number} is the real number {value}; there is no regression here: give "
                "classes, such as ranges."
            )
        if not isinstance(value, int | str):
            raise UserError(
                f"{where}: the label of sample {number} is {str(value)[:60]}, several values; a sample has one class "
                "here: give the id or the name of that class. Images with several labels are read by "
                "data.name: multilabel:PATH."
            )
        out.append(value)
    return out


def _plain(value: Any) -> Any:
    """An int, float or str; None for an absent label; anything else as it is."""
    if (
        isinstance(value, Tensor | np.ndarray | np.generic)
        and (value.numel() if isinstance(value, Tensor) else value.size) == 1
    ):
        value = value.item()
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, float):
        return None if value != value else int(value) if value.is_integer() else value
    if isinstance(value, str):
        return value if value.strip() else None
    if value is None or isinstance(value, int | list | tuple | set | dict | Tensor | np.ndarray):
        return value
    return str(value)


def whole_numbers(values: Any, where: str) -> np.ndarray:
    """(N,) int64 class ids. Raises `UserError` as `read_labels`, and for words."""
    labels = read_labels(values, where)
    word = next((v for v in labels if isinstance(v, str) and not INTEGER.fullmatch(v)), None)
    if word is not None:
        raise UserError(f"{where}: labels must be whole numbers, one a sample; given: '{word}'.")
    try:
        return np.array([int(v) for v in labels], dtype=np.int64)
    except OverflowError:
        raise UserError(f"{where}: the label {max(labels, key=int)} is no class id; ids count from 0.") from None


def class_order(names: Iterable[str]) -> list[str]:
    """Distinct class names in label order: by number where all are whole numbers (0, 1, 2, 10), else as text.

    >>> class_order(["10", "2", "0"]), class_order(["b", "10", "2"])
    (['0', '2', '10'], ['10', '2', 'b'])
    """
    distinct = set(names)
    if all(INTEGER.fullmatch(n) for n in distinct):
        return sorted(distinct, key=lambda n: (int(n), n))
    return sorted(distinct)


def ids_of(labels: Sequence[int | str], classes: Sequence[str], where: str) -> np.ndarray:
    """(N,) int64: the place of each label's name among the classes. Raises `UserError` for a class that is not among
    them."""
    ids = {name: i for i, name in enumerate(classes)}
    strange = next((str(v) for v in labels if str(v) not in ids), None)
    if strange is not None:
        listed = ", ".join(classes[:12]) + (", …" if len(classes) > 12 else "")
        raise UserError(f"{where}: the class '{strange}' is not among the training samples' ({listed}).")
    return np.array([ids[str(v)] for v in labels], np.int64)


def unnamed(labels: Sequence[np.ndarray], where: str) -> list[str]:
    """Names "0", "1", … up to the highest id of any split. Raises `UserError` where ids are no count of classes."""
    highest, samples = max(int(x.max(initial=0)) for x in labels), sum(map(len, labels))
    if highest >= max(MOST_UNNAMED, samples):
        raise UserError(f"{where}: {samples} samples have labels up to {highest}; class ids must count from 0.")
    return [str(i) for i in range(highest + 1)]
