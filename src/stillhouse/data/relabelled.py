"""`Relabelled`: another data set's samples with labels of their own."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from stillhouse.data.dataset import BatchKey, IndexedDataset
from stillhouse.signals import Batch


class Relabelled:
    """The samples of another data set with other labels.

    Args:
        samples: the other data set.
        labels: (n, …), in index order.
    """

    def __init__(self, samples: IndexedDataset, labels: Tensor) -> None:
        self._samples, self._labels = samples, labels

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self) -> Tensor:
        """(n, …), in index order."""
        return self._labels.clone()

    def __getitem__(self, index: int) -> Batch:
        return {**self._samples[index], "label": self._labels[index]}

    def batch(self, key: BatchKey, seed: int) -> Batch:
        return self._own(self._samples.batch(key, seed))

    def recorded(self, key: BatchKey, seed: int) -> tuple[Batch, dict[str, np.ndarray]]:
        batch, drawn = self._samples.recorded(key, seed)
        return self._own(batch), drawn

    def _own(self, batch: Batch) -> Batch:
        return {**batch, "label": self._labels[batch["index"]]}
