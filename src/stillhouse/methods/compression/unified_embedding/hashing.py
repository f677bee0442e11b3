"""Values of categorical features -> 64-bit integers -> rows of a table, the same on every machine and in every process.

A value is an integer, or a word, which becomes the 64-bit BLAKE2b hash of its UTF-8; a missing value is a token of its
own. The row is splitmix64 of (value, salt) modulo the number of rows; salts are functions of (feature, chunk, hash), so
that equal values of two features have nothing to do with each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.errors import UserError

MISSING = -(1 << 63)
"""The code of a missing value; it is hashed like any other, and so has a row of its own for every feature."""
GOLDEN = 0x9E3779B97F4A7C15
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
_MASK = (1 << 64) - 1


def encode(values: Sequence[Any] | np.ndarray | Tensor) -> Tensor:
    """Integers, words and None of any shape -> int64 codes of that shape.

    Raises:
        UserError: a value that is none of these, such as a fraction.

    >>> encode([3, None]).tolist() == [3, MISSING]
    True
    """
    if isinstance(values, Tensor) and not values.is_floating_point():
        return values.to(torch.int64)
    array = (
        values.numpy()
        if isinstance(values, Tensor)
        else np.asarray(values, dtype=None if isinstance(values, np.ndarray) else object)
    )
    if array.dtype.kind in "iub":
        return torch.from_numpy(array.astype(np.int64))
    found: dict[Any, int] = {}
    codes = np.empty(array.size, dtype=np.int64)
    for i, value in enumerate(array.reshape(-1).tolist()):
        if value not in found:
            found[value] = _code(value)
        codes[i] = found[value]
    return torch.from_numpy(codes.reshape(array.shape))


def _code(value: Any) -> int:
    if value is None:
        return MISSING
    if isinstance(value, str):
        return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little", signed=True)
    if isinstance(value, int):
        return _signed(value & _MASK)
    raise UserError(
        f"unified_embedding: a categorical value must be an integer, a word or None; given: {value!r} "
        f"({type(value).__name__})."
    )


def salt(feature: int, chunk: int, part: int = 0) -> int:
    """The signed 64-bit salt of a feature's chunk (and of one of several hashes of it)."""
    x = 0
    for word in (feature, chunk, part):
        x = _mixed((x + (word + 1) * GOLDEN) & _MASK)
    return _signed(x)


def bucket(codes: Tensor, salts: Tensor, rows: Tensor | int) -> Tensor:
    """Rows in [0, rows) of int64 codes under int64 salts; the three are broadcast."""
    x = codes * _signed(GOLDEN) + salts  # wraps modulo 2^64
    for shift, factor in ROUNDS:
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return ((x >> 1) & ((1 << 63) - 1)) % rows


def _mixed(x: int) -> int:
    for shift, factor in ROUNDS:
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return x


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
