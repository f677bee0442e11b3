"""Multi-label classification: any number of labels a sample, each of which is there or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError
from stillhouse.evaluation.judge import Meter
from stillhouse.evaluation.multi_label import GROUPS, MultiLabelMeter
from stillhouse.signals import Batch, Signals, read_logits
from stillhouse.tasks.base import Task
from stillhouse.tasks.classification import Classification, fitted

SHOWN = 5


@dataclass(frozen=True)
class MultiLabel(Task):
    """Logits (B, C, 2) and labels (B, C): 1 where a sample has the label, 0 where not, -100 where nobody knows.

    A network gives one score a label, (B, C), which is the logit of a sigmoid. Beside a 0 it is the pair of logits of a
    decision between two classes, so cross-entropy is the binary one, and objectives that compare class probabilities
    compare the teacher's and the student's probability of each label.

    Attributes:
        classes: names of the labels, in order.
        input_shape: of one sample, (C, H, W) for images.
        mean, std: the normalisation per channel; () for inputs used as they are.
    """

    name: ClassVar[str] = "multi_label"
    reads: ClassVar[str] = "images"
    groups: ClassVar[tuple[str, ...]] = GROUPS
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def _classifier(self) -> Classification:
        return Classification(self.classes, self.input_shape, self.mean, self.std)

    @property
    def positions(self) -> bool:
        return True

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes

    @property
    def outcomes(self) -> int:
        return 2

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.mean, self.std

    def build(self, spec: ModelSpec) -> nn.Module:
        return self._classifier.build(spec)

    def example(self) -> Batch:
        return self._classifier.example()

    def read(self, output: Any, batch: Batch) -> Signals:
        scores = read_logits(output)
        if scores.ndim != 2 or scores.shape[1] != len(self.classes):
            raise UserError(
                f"A network for {len(self.classes)} labels gives scores (B, {len(self.classes)}); this one gives "
                f"{tuple(scores.shape)}: teacher and student need the same labels, in the same order."
            )
        return Signals(logits=torch.stack([torch.zeros_like(scores), scores], -1))

    def meter(self, groups: Sequence[str]) -> Meter:
        return MultiLabelMeter(self.classes, groups)

    @torch.no_grad()
    def predict(self, module: nn.Module, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """For each uint8 image (C, H, W): its `labels`, those of a probability above one half, and the largest
        `probs` by name."""
        x = fitted(inputs, self.input_shape, self.mean, self.std).to(next(module.parameters()).device)
        found = []
        for probs in read_logits(self.call(module, {"input": x})).float().sigmoid().cpu():
            order = probs.argsort(descending=True).tolist()
            found.append(
                {
                    "labels": [self.classes[i] for i in order if probs[i] > 0.5],
                    "probs": {self.classes[i]: round(float(probs[i]), 4) for i in order[:SHOWN]},
                }
            )
        return found

    def pictures(self, batch: Batch, outputs: Signals) -> list[Tensor]:
        return self._classifier.pictures(batch, outputs)

    def truth(self, batch: Batch) -> list[Tensor]:
        return self.pictures(batch, Signals())

    def captions(self, batch: Batch, outputs: Signals | None) -> list[str]:
        has = batch["label"] == 1 if outputs is None else outputs.log_probs().argmax(-1) == 1
        return [", ".join(self.classes[i] for i in row.nonzero().flatten().tolist()) or "none" for row in has.cpu()]
