"""`Subset`: some samples of a data set, with other labels where wanted, as a data set of its own (few-shot shares,
omitted classes, queried points)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stillhouse.data.dataset import BatchKey
from stillhouse.data.loader import BatchDataset
from stillhouse.errors import UserError
from stillhouse.signals import Batch


class Subset:
    """Rows of a data set, renumbered 0..n-1; a `Loader` reads it like the whole.

    Args:
        dataset: an `IndexedDataset`, or any object with its `__len__`, `batch` and `labels`.
        rows: (n,) positions in it, in the order wanted.
        targets: (n, C) soft labels to give in place of its own; default: its own.

    Raises:
        UserError: a row that the data set does not have, or targets of another length.
    """

    def __init__(
        self, dataset: BatchDataset, rows: Sequence[int] | np.ndarray | Tensor, targets: Tensor | None = None
    ) -> None:
        self.dataset, self.rows, self.targets = dataset, np.asarray(rows, dtype=np.int64), targets
        if len(self.rows) and not 0 <= self.rows.min() <= self.rows.max() < len(dataset):
            raise UserError(
                f"A subset's rows must be from 0 to {len(dataset) - 1}; given: {self.rows.min()} to {self.rows.max()}."
            )
        if targets is not None and len(targets) != len(self.rows):
            raise UserError(f"A subset of {len(self.rows)} rows needs as many targets; given: {len(targets)}.")

    def __len__(self) -> int:
        return len(self.rows)

    def labels(self) -> Tensor:
        """(n,) int64 in index order: the class of most weight where targets are soft."""
        if self.targets is not None:
            return self.targets.argmax(-1)
        return self.dataset.labels()[torch.from_numpy(self.rows)]

    def batch(self, key: BatchKey, seed: int) -> Batch:
        """The batch of the rows; `index` counts within the subset."""
        made = self.dataset.batch(BatchKey(key.epoch, self.rows[key.indices], key.start, key.stop), seed)
        made["index"] = torch.from_numpy(key.indices[key.start : key.stop])
        if self.targets is not None:
            if made["label"].is_floating_point():
                raise UserError("The targets of a subset cannot be mixed: turn data.mixup and data.cutmix off.")
            made["label"] = self.targets[made["index"]]
        return made
