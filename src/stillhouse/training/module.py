"""`TrainingModule`: what `fit` trains. Subclass it for a loss that is no list of objectives; `Distillation` is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stillhouse.signals import Batch, Signals, call_model, read_logits
from stillhouse.training.context import Context, Progress


class TrainingModule(nn.Module):
    """A student with its loss. A subclass sets `student` and writes `forward`; every other method has a default.

    >>> class Regression(TrainingModule):
    ...     def __init__(self, student: nn.Module) -> None:
    ...         super().__init__()
    ...         self.student = student
    ...
    ...     def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
    ...         return {"loss": nn.functional.mse_loss(self.student(batch["input"]), batch["label"])}
    """

    student: nn.Module

    @property
    def teachers(self) -> Mapping[str, Any]:
        """All teachers by name; default: none."""
        return {}

    def forward(self, batch: Batch, progress: Progress) -> Mapping[str, Tensor]:
        """`loss`, which is minimised, and further terms, which are logged: scalars on the device."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(batch, progress).")

    def build(self, batch: Batch) -> Any:
        """Once, on the device, before the optimiser exists: make layers whose size depends on a batch, check the
        data."""

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of the optimiser; default: every parameter of the student that requires gradients."""
        return [{"params": [p for p in self.student.parameters() if p.requires_grad]}]

    def prepare(self, ctx: Context) -> None:
        """Once, after `build`: read the training data or the teachers."""

    def begin_epoch(self, ctx: Context) -> None:
        """At the start of each epoch."""

    def before_step(self, batch: Batch, ctx: Context) -> None:
        """Before the forward pass of each batch: inner steps of an own optimiser."""

    def before_update(self, ctx: Context) -> None:
        """Before each step of the optimiser, when the gradients are there."""

    def after_step(self, batch: Batch, progress: Progress, stepped: bool) -> None:
        """After each batch; `stepped`: whether the optimiser stepped (it does not between accumulated batches)."""

    def read_student(self, batch: Batch) -> Signals:
        """The student's outputs on a batch, for `Context.sweep`; default: its logits."""
        return Signals(logits=read_logits(call_model(self.student, batch)))
