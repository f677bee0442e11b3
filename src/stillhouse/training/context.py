"""The training as its objectives see it: `Progress`, the protocol `Context`, and `TrainingContext`, that of a fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.randomness import generator
from stillhouse.signals import Batch, Signals, to_device


@dataclass
class Progress:
    """Where training is. `step` counts optimiser steps from 0; `epoch` counts from 0; `batch` counts within the
    epoch."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    steps_per_epoch: int = 1
    epochs: int = 1

    @property
    def exact_epoch(self) -> float:
        """Epochs done, with the fraction of the current one."""
        return self.epoch + self.batch / max(self.steps_per_epoch, 1)

    @property
    def fraction(self) -> float:
        """Share of the whole training that is done, in [0, 1]."""
        return min(self.exact_epoch / max(self.epochs, 1), 1.0)


class Context(Protocol):
    """The training as an objective sees it: its models, data, progress and seed."""

    progress: Progress

    @property
    def student(self) -> nn.Module:
        """The model being trained."""
        ...

    @property
    def teachers(self) -> Mapping[str, Any]:
        """All teachers by name."""
        ...

    def sweep(self, split: str, of: str = "teacher") -> Iterator[tuple[Batch, Signals]]:
        """Batches of a split (`train`, `holdout`, `val`) under evaluation transforms with the signals of a teacher or
        of `"student"`; no autograd; every process sweeps the whole split."""
        ...

    def class_mean(self, what: Literal["probs", "logits", "embedding"], of: str = "teacher") -> tuple[Tensor, Tensor]:
        """(C, ·) mean of a signal per class over the training set, and the (C,) count of samples per class."""
        ...

    def labels(self, split: str = "train") -> Tensor:
        """(N,) labels of a split, in index order."""
        ...

    def holdout(self, n: int) -> Batch:
        """n held-out samples, a function of (seed, step)."""
        ...

    def generator(self, *key: int | str) -> torch.Generator:
        """A generator keyed by the run's seed and `key`."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """Rows of all ranks, with gradient; the identity on one rank."""
        ...


class TrainingContext(Context):
    """The context of a fit."""

    def __init__(
        self,
        module: Any,  # a `TrainingModule`, which is written in terms of this file
        progress: Progress,
        splits: Mapping[str, Any],
        seed: int,
        device: torch.device,
        folder: Path,
        train: Any,
    ) -> None:
        self.module, self.progress, self._train = module, progress, train
        self._splits, self._seed, self._device = dict(splits), seed, device
        self._means: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self._holdout_batches: Any = None

    @property
    def student(self) -> nn.Module:
        return self.module.student

    @property
    def teachers(self) -> Mapping[str, Any]:
        return self.module.teachers

    def split(self, name: str) -> Any:
        """The evaluation loader of a split."""
        if name not in self._splits:
            raise UserError(
                f"This training was given no '{name}' split"
                + (
                    "; set data.holdout to a share above 0."
                    if name == "holdout"
                    else f"; it has: {', '.join(self._splits) or 'none'}."
                )
            )
        return self._splits[name]

    def labels(self, split: str = "train") -> Tensor:
        """Labels of a split in index order, (N,)."""
        source = self._train if split == "train" else self.split(split)
        labels = None if source is None else source.labels()
        if labels is None:
            raise UserError(
                f"The labels of the '{split}' split are not known before training; train from a recipe, or give the "
                "loader's data set a `labels()`."
            )
        return labels

    def count(self, split: str = "train") -> int:
        return len(self.labels(split))

    @torch.no_grad()
    def sweep(self, split: str, of: str = "teacher") -> Iterator[tuple[Batch, Signals]]:
        student = self.module.student
        mode = student.training
        student.eval()
        try:
            for batch in self.split(split):
                batch = to_device(batch, self._device)
                yield batch, self.module.read_student(batch) if of == "student" else self.module.teachers[of](batch)
        finally:
            student.train(mode)

    def class_mean(self, what: str, of: str = "teacher") -> tuple[Tensor, Tensor]:
        if (what, of) in self._means and of != "student":
            return self._means[what, of]
        sums: Tensor | None = None
        counts: Tensor | None = None
        for batch, signals in self.sweep("train", of):
            value = {
                "probs": lambda s: s.log_probs().exp(),
                "logits": lambda s: s.log_probs(),
                "embedding": lambda s: s.require("embedding"),
            }[what](signals)
            labels = batch["label"]
            if labels.ndim != 1:
                raise UserError(
                    "Class means need class ids, but the training labels are soft; switch mixup and cutmix off for "
                    "the sweep, or label the data hard."
                )
            if sums is None or counts is None:
                classes = signals.log_probs().shape[-1]
                sums = torch.zeros(classes, value.shape[-1], dtype=torch.float64, device=value.device)
                counts = torch.zeros(classes, dtype=torch.float64, device=value.device)
            sums.index_add_(0, labels, value.double())
            counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        if sums is None or counts is None:
            raise UserError("The training data holds no samples.")
        mean = (sums / counts.clamp_min(1).unsqueeze(1)).float()
        self._means[what, of] = (mean, counts.long())
        return self._means[what, of]

    def holdout(self, n: int) -> Batch:
        from stillhouse.data import Loader

        source = self.split("holdout")
        dataset = source.dataset
        n = min(n, len(dataset))
        if self._holdout_batches is None or self._holdout_batches.batch_size != n:
            self._holdout_batches = Loader(dataset, n, seed=self._seed, shuffle=True, drop_last=True)
        loader = self._holdout_batches
        epoch, batch = divmod(self.progress.epoch * self.progress.steps_per_epoch + self.progress.batch, len(loader))
        return to_device(next(iter(loader.batches(epoch, batch, epoch + 1))), self._device)

    def generator(self, *keys: int | str) -> torch.Generator:
        return generator(self._seed, *keys)

    def gather(self, x: Tensor) -> Tensor:
        from stillhouse.functional.gather import gather

        return gather(x)
