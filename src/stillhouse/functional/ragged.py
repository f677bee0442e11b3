"""Rows of different lengths in two arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RaggedArray:
    """Rows of different lengths: row i is `values[starts[i]:starts[i + 1]]`."""

    values: np.ndarray  # (T,) int64
    starts: np.ndarray  # (N + 1,) int64

    @classmethod
    def of(cls, rows: Sequence[Sequence[int] | np.ndarray]) -> RaggedArray:
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return cls(np.concatenate([np.asarray(r, np.int64) for r in rows]) if rows else np.zeros(0, np.int64), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def padded(self, rows: np.ndarray, fill: int) -> Tensor:
        """(B, L) int64 of these rows, L the longest of them, filled at the end."""
        lengths = self.lengths[rows]
        inside = np.arange(max(int(lengths.max()), 1))[None, :] < lengths[:, None]
        out = np.full(inside.shape, fill, np.int64)
        at = (self.starts[rows][:, None] + np.arange(inside.shape[1])[None, :])[inside]
        out[inside] = self.values[at]
        return torch.from_numpy(out)
