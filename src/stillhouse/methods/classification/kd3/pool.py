"""The pool of images from elsewhere, and batches of those that are selected at the moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stillhouse.config.specs import DataSpec
from stillhouse.data import BatchKey, Loader
from stillhouse.data.dataset import IndexedDataset, PixelInputs
from stillhouse.data.joined import JoinedDataset, Part, unlabelled
from stillhouse.errors import UserError
from stillhouse.processes import share
from stillhouse.randomness import permutation
from stillhouse.runs.run import Run
from stillhouse.signals import Batch


class PoolPart(DataSpec):
    """A data set whose images go into the pool; its labels are not read."""

    split: Literal["train", "holdout"] = Field("train", description="Which of its splits.")
    style: list[str | dict[str, Any]] = Field(
        default_factory=list,
        description="Transforms as in `augment`, drawn once for every image and stored: the images then come from "
        "another distribution.",
    )

    @property
    def source(self) -> DataSpec:
        """The data set, with the style in place of its augmentation."""
        kept = self.model_dump(exclude={"split", "style"})
        return DataSpec(**{**kept, "augment": self.style or self.augment, "mixup": 0.0, "cutmix": 0.0})


def pool_images(parts: list[PoolPart], target: DataSpec, run: Run, *, train: bool) -> JoinedDataset:
    """All images of the pool, normalised as the target's are: augmented for training, or in the one view that selection
    sees.

    A styled part lies in memory and is augmented by shifted crops and (colour images) flips; others by their own
    `augment`.
    """
    return JoinedDataset([_part(part, target, run, train=train, where=f"pool.{i}") for i, part in enumerate(parts)])


def _part(part: PoolPart, target: DataSpec, run: Run, *, train: bool, where: str) -> Part:
    own, theirs = run.data(part.source), run.data(target)
    whole = unlabelled(own, theirs, train=train, split=part.split, where=where)
    if not part.style:
        return whole
    styled = own.dataset(part.split, train=True)
    rows = np.arange(len(styled))
    mean, std = (torch.tensor(v)[:, None, None] for v in (own.mean, own.std))
    chunks = [
        styled.batch(BatchKey(0, r, 0, len(r)), part.seed)["input"]
        for r in np.array_split(rows, max(1, len(rows) // 512))
    ]
    pixels = torch.cat([((c * std + mean) * 255).round().clamp(0, 255).to(torch.uint8) for c in chunks])
    size = (pixels.shape[-2], pixels.shape[-1])
    inputs = PixelInputs(
        pixels,
        rows,
        theirs.mean,
        theirs.std,
        size,
        max(size[0] // 8, 1) if train else 0,
        train and pixels.shape[1] == 3,
    )
    return Part(IndexedDataset(inputs, np.zeros(len(rows), dtype=np.int64), 1), rows)


class SelectedBatches:
    """The training batches of a pool: each epoch, those images that are selected as it begins; an epoch has as many
    steps whatever their number.

    Args:
        images: the pool with training augmentation.
        selected: gives (N,) which are selected now.
        batch_size: over all processes.
        seed: of order and augmentation.
        workers: loader processes.

    Raises:
        UserError: a pool of fewer images than a batch.
    """

    def __init__(
        self, images: JoinedDataset, selected: Callable[[], Tensor], batch_size: int, seed: int, workers: int = 0
    ) -> None:
        if len(images) < batch_size:
            raise UserError(f"The pool holds {len(images)} images, fewer than train.batch_size ({batch_size}).")
        self.images, self.selected, self.batch_size, self.seed, self.workers = (
            images,
            selected,
            batch_size,
            seed,
            workers,
        )

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(epochs=1)

    def batches(self, epoch: int = 0, batch: int = 0, epochs: int | None = None) -> Iterator[Batch]:
        """One stream from (epoch, batch) to the end of `epochs`; the selection is read with an epoch's first batch."""
        while epochs is None or epoch < epochs:
            rows = self.selected().nonzero()[:, 0].cpu().numpy()
            rows = rows[permutation(len(rows), self.seed, "selected", epoch)]
            dataset = _RepeatedRows(self.images, np.resize(rows, len(self) * self.batch_size))
            loader = Loader(
                dataset, self.batch_size, seed=self.seed, shuffle=True, drop_last=True, workers=self.workers, **share()
            )
            yield from loader.batches(epoch, batch, epoch + 1)
            epoch, batch = epoch + 1, 0


class _RepeatedRows:
    """Images by a list of rows in which some may come twice."""

    def __init__(self, images: JoinedDataset, rows: np.ndarray) -> None:
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    def labels(self) -> Tensor:
        return self.images.labels()[torch.from_numpy(self.rows)]

    def batch(self, key: BatchKey, seed: int) -> Batch:
        return self.images.batch(BatchKey(key.epoch, self.rows[key.indices], key.start, key.stop), seed)
