"""`JoinedDataset`: chosen samples of several data sets as one, such as a target set and an unlabelled pool."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stillhouse.data.bundle import DataBundle
from stillhouse.data.dataset import BatchKey, IndexedDataset
from stillhouse.errors import UserError
from stillhouse.signals import Batch


@dataclass(frozen=True)
class Part:
    """Samples `rows` (n,) of a data set. Inputs x become `scale * x + shift` (per channel). Labels are `labels` (n,),
    or with `labelled` the data set's own, else -1."""

    dataset: IndexedDataset
    rows: np.ndarray
    scale: Tensor | None = None
    shift: Tensor | None = None
    labelled: bool = False
    labels: Tensor | None = None


def unlabelled(
    pool: DataBundle,
    target: DataBundle,
    rows: np.ndarray | None = None,
    *,
    train: bool,
    split: str = "train",
    where: str = "pool",
) -> Part:
    """Images of a pool, normalised as the target's are, without labels.

    Args:
        pool, target: their bundles.
        rows: which; None for all.
        train: with the pool's training augmentation.
        split: of the pool.
        where: what the message calls the pool's spec.

    Raises:
        UserError: images of another shape than the target's.
    """
    if tuple(pool.input_shape) != tuple(target.input_shape):
        raise UserError(
            f"{where}: the images of '{pool.name}' have shape {tuple(pool.input_shape)}, those of '{target.name}' "
            f"{tuple(target.input_shape)}; "
            f"set {where}.image_size, and choose images of as many channels."
        )
    dataset = pool.dataset(split, train=train)
    rows = np.arange(len(dataset)) if rows is None else rows
    if (pool.mean, pool.std) == (target.mean, target.std) or not pool.mean or not target.mean:
        return Part(dataset, rows)
    own_mean, own_std, mean, std = (
        torch.tensor(v)[:, None, None] for v in (pool.mean, pool.std, target.mean, target.std)
    )
    return Part(dataset, rows, own_std / std, (own_mean - mean) / std)


class JoinedDataset:
    """Several parts one after the other; what `stillhouse.data.Loader` asks of a data set. `index` counts through all
    parts."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self._starts = np.cumsum([0, *(len(p.rows) for p in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def labels(self) -> Tensor:
        """(n,) class ids, -1 where a part is unlabelled."""
        return torch.cat([_labels(part, torch.arange(len(part.rows))) for part in self.parts])

    def batch(self, key: BatchKey, seed: int) -> Batch:
        """`input`, `label` (B,), `index` (B,), and the `views` that all parts have.

        Raises:
            UserError: parts with other views.
        """
        index = key.indices[key.start : key.stop]
        source = np.searchsorted(self._starts, index, side="right") - 1
        inputs: dict[str | None, Tensor] = {}  # view -> values; None: the input itself
        label = torch.full((len(index),), -1)
        for number, part in enumerate(self.parts):
            at = np.flatnonzero(source == number)
            if not len(at):
                continue
            where, own = torch.from_numpy(at), index[at] - self._starts[number]
            rows = part.rows[own]
            got = part.dataset.batch(BatchKey(key.epoch, rows, 0, len(rows)), seed)
            found: dict[str | None, Tensor] = {None: got["input"], **got.get("views", {})}
            if inputs and found.keys() != inputs.keys():
                raise UserError("Joined data sets need the same data.views.")
            for name, x in found.items():
                values = x if part.scale is None or part.shift is None else x * part.scale + part.shift
                if name not in inputs:
                    inputs[name] = values.new_empty(len(index), *values.shape[1:])
                inputs[name][where] = values
            label[where] = _labels(part, torch.from_numpy(own))
        batch: Batch = {"input": inputs.pop(None), "label": label, "index": torch.from_numpy(index)}
        return batch | ({"views": inputs} if inputs else {})


def _labels(part: Part, own: Tensor) -> Tensor:
    """Class ids of some of a part's samples, by position in the part."""
    if part.labels is not None:
        return part.labels[own]
    if part.labelled:
        return part.dataset.labels()[torch.from_numpy(part.rows)[own]]
    return torch.full((len(own),), -1)
