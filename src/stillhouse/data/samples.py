"""`SampleDataset`: what `IndexedDataset` is for a class id, for samples of any other form: read one by one, transformed
as a whole, stacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.data.dataset import BatchKey
from stillhouse.data.splits import Splits
from stillhouse.errors import UserError
from stillhouse.randomness import keyed
from stillhouse.signals import Batch
from stillhouse.tasks.base import Task

Sample = dict[str, Any]
"""`input`, and a target under the task's own names."""


class SampleDataset:
    """The samples 0..n-1 of a split.

    Args:
        read: the sample at a position of the source.
        rows: (n,) the split's positions, in order.
        transform: on a whole sample, so that image, mask and boxes move together; drawn under keys of (seed, epoch,
            index).
        ragged: names whose values differ in shape: a batch holds them as a list, one a sample; everything else is
            stacked.
        classes: (n,) int64 class ids, where a sample has one class.
    """

    def __init__(
        self,
        read: Callable[[int], Sample],
        rows: np.ndarray,
        transform: Callable[[Sample], Sample],
        ragged: Sequence[str] = (),
        classes: np.ndarray | None = None,
    ) -> None:
        self._read, self._rows, self._transform, self._ragged, self._classes = (
            read,
            rows,
            transform,
            frozenset(ragged),
            classes,
        )

    def __len__(self) -> int:
        return len(self._rows)

    def labels(self) -> Tensor | None:
        """(n,) class ids in index order; None where a sample has no one class."""
        return None if self._classes is None else torch.from_numpy(self._classes).clone()

    def raw(self, index: int) -> Sample:
        """One sample as the source has it, before any transform."""
        return self._read(int(self._rows[index]))

    def joined(self, read: Callable[[int, Sample], Sample], ragged: Sequence[str] = ()) -> SampleDataset:
        """The same samples with further values, which the transforms see.

        Args:
            read: the further values of the sample at an index of this split, which it is given as the source has it.
            ragged: further names whose values differ in shape.
        """
        at = {int(row): index for index, row in enumerate(self._rows)}
        plain = self._read

        def both(position: int) -> Sample:
            sample = plain(position)
            return {**sample, **read(at[position], sample)}

        return SampleDataset(both, self._rows, self._transform, [*self._ragged, *ragged], self._classes)

    def __getitem__(self, index: int) -> Sample:
        """One sample, as a training step of seed 0 and epoch 0 would see it."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._sample(index % len(self), 0, 0)

    def batch(self, key: BatchKey, seed: int) -> Batch:
        """A process's share of a batch: the samples' values by name, and `index` (B,)."""
        own = key.indices[key.start : key.stop]
        samples = [self._sample(i, key.epoch, seed) for i in own.tolist()]
        batch: Batch = {name: self._joined(name, [s[name] for s in samples]) for name in samples[0]}
        return {**batch, "index": torch.from_numpy(own)}

    def _sample(self, index: int, epoch: int, seed: int) -> Sample:
        with keyed(seed, "augment", epoch, index):
            return self._transform(self._read(int(self._rows[index])))

    def _joined(self, name: str, values: list[Any]) -> Any:
        if name in self._ragged:
            return values
        shapes = {tuple(v.shape) for v in values}
        if len(shapes) > 1:
            raise UserError(
                f"The samples of a batch have a `{name}` of different shapes: "
                f"{', '.join(map(str, sorted(shapes)[:3]))}; "
                "set data.image_size, or make them equal in data.augment."
            )
        return torch.stack(values)


@dataclass
class SampleBundle(Splits):
    """A data set of samples ready for use.

    Attributes:
        name: as in the recipe.
        task: what is predicted.
        fingerprint: a hash of the samples, their splits and what is fixed of their transforms.
        splits: name -> positions.
        make: (split, for training) -> its samples.
        flip: whether a mirrored image keeps its meaning.
        contents: position -> (k,) the class ids that a sample holds, where samples hold several.
        names: of all samples of the source, by position; () where they have none.
    """

    name: str
    task: Task
    fingerprint: str
    splits: Mapping[str, np.ndarray] = field(repr=False)
    make: Callable[[str, bool], SampleDataset] = field(repr=False)
    evaluation_batch: int = 16
    flip: bool = True
    contents: Callable[[int], np.ndarray] | None = field(repr=False, default=None)
    names: Sequence[str] = field(default=(), repr=False)

    def named(self, split: str) -> list[str] | None:
        """The names of a split's samples, in order; None where they have none."""
        self.require(split)
        return [self.names[i] for i in self.splits[split].tolist()] if self.names else None

    def dataset(self, split: str, *, train: bool) -> SampleDataset:
        """A split's samples, with training augmentation (`train=True`) or as they are evaluated.

        Raises:
            UserError: a split that this data set does not have.
        """
        self.require(split)
        return self.make(split, train)
