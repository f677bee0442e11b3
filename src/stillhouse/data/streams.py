"""`Streams`: labelled and unlabelled batches side by side, for methods that learn from both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from stillhouse.data.bundle import DataBundle
from stillhouse.data.loader import BatchLoader, Loader
from stillhouse.errors import UserError
from stillhouse.signals import Batch


class Streams(BatchLoader):
    """Batches of labelled data, each of which carries one of unlabelled data under `unlabelled`.

    An epoch is one pass over the longer of the two, or `length` batches. The shorter is cycled: batch g of the whole
    training (g counts through the epochs) is its batch g mod length, of its own epoch g // length, so that every pass
    has an order and an augmentation of its own, and a start in mid-epoch gives the same batches.

    Args:
        labelled: what the batch itself is; also gives labels, counts and sizes.
        unlabelled: its batches lose their `label`. Give it a seed of its own: with the same seed, data sets of equal
            length come in the same order.
        length: batches of an epoch; None: one pass over the longer.
        name: under which the unlabelled batch is carried; a stream whose labelled data are `Streams` carries two.

    Raises:
        UserError: one of the two holds no samples.
    """

    def __init__(
        self, labelled: Loader | Streams, unlabelled: BatchLoader, length: int | None = None, name: str = "unlabelled"
    ) -> None:
        self.labelled, self.unlabelled, self.length, self.name = labelled, unlabelled, length, name
        for which, loader in (("labelled", labelled), ("unlabelled", unlabelled)):
            if not len(loader):
                raise UserError(f"The {which} data holds no samples.")

    def __len__(self) -> int:
        """Batches an epoch."""
        return self.length or max(len(self.labelled), len(self.unlabelled))

    @property
    def dataset(self) -> object:
        """The labelled data set."""
        return self.labelled.dataset

    @property
    def batch_size(self) -> int:
        """Labelled samples of one batch over all processes."""
        return self.labelled.batch_size

    @property
    def count(self) -> int:
        """Labelled samples, over all processes."""
        return self.labelled.count

    @property
    def usual_size(self) -> int:
        """Labelled samples of a full batch in one process."""
        return self.labelled.usual_size

    @property
    def even(self) -> bool:
        """Whether all labelled batches, in all processes, hold equally many samples."""
        return self.labelled.even

    def labels(self) -> Tensor:
        """(count,) int64 labels of the labelled samples, in index order."""
        return self.labelled.labels()

    def batches(self, epoch: int = 0, batch: int = 0, epochs: int | None = None) -> Iterator[Batch]:
        """One stream of batches from (epoch, batch) to the end of `epochs` (None: without end).

        Raises:
            UserError: a starting batch beyond the epoch.
        """
        if not 0 <= batch <= len(self):
            raise UserError(
                f"Cannot start at batch {batch} of an epoch of {len(self)} batches; were the data or the batch size "
                "changed?"
            )
        return self._stream(epoch * len(self) + batch, None if epochs is None else epochs * len(self))

    def _stream(self, first: int, end: int | None) -> Iterator[Batch]:
        labelled, unlabelled = (s.batches(*divmod(first, len(s))) for s in (self.labelled, self.unlabelled))
        number = first
        try:
            while end is None or number < end:
                other = next(unlabelled)
                yield {**next(labelled), self.name: {k: v for k, v in other.items() if k != "label"}}
                number += 1
        finally:
            for stream in (labelled, unlabelled):
                _close(stream)


def pool_for(target: Any, pool: Any) -> Any:
    """Another data set as unlabelled inputs of the target's networks: its images normalised as the target's are.

    Args:
        target, pool: bundles of `stillhouse.data`.

    Raises:
        UserError: inputs of another shape.
    """
    if type(target) is not type(pool):
        raise UserError(
            f"data.unlabelled: '{pool.name}' is data for {pool.task.name}, but '{target.name}' for {target.task.name}; "
            "choose data of one kind."
        )
    if not isinstance(pool, DataBundle):
        return pool
    if tuple(target.input_shape) != tuple(pool.input_shape):
        raise UserError(
            f"data.unlabelled: the inputs of '{pool.name}' have shape {tuple(pool.input_shape)}, those of "
            f"'{target.name}' {tuple(target.input_shape)}; set data.unlabelled.data.image_size, and choose images of "
            "as many channels."
        )
    return replace(pool, task=replace(pool.task, mean=target.mean, std=target.std), _pixels={})


def _close(stream: Iterator[Batch]) -> None:
    """End the workers of a stream."""
    close = getattr(stream, "close", None)
    if close is not None:
        close()
