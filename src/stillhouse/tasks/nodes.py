"""Nodes: one class a node of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError
from stillhouse.evaluation.judge import Meter
from stillhouse.functional.counting import IGNORED
from stillhouse.models import build
from stillhouse.signals import Batch, Signals
from stillhouse.tasks.base import Task


@dataclass(frozen=True)
class Nodes(Task):
    """Logits (N, C) of all nodes; labels (N,), -100 outside the split. A student that does without the graph reads
    features (N, D) alone.

    Attributes:
        classes: names, in label order.
        features: D.
    """

    name: ClassVar[str] = "nodes"
    groups: ClassVar[tuple[str, ...]] = ("accuracy",)
    classes: tuple[str, ...]
    features: int

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes

    def build(self, spec: ModelSpec) -> nn.Module:
        return build(spec, len(self.classes), (self.features,))

    def meter(self, groups: Sequence[str]) -> Meter:
        return NodeMeter()

    def one(self, batch: Batch) -> Batch:
        return {"input": torch.zeros(1, self.features, device=batch["input"].device)}

    def example(self) -> Batch:
        return {"input": torch.zeros(1, self.features)}


class NodeMeter:
    """`accuracy` on the nodes of the split; where some were hidden from training, also on those (`accuracy_hidden`) and
    on the others (`accuracy_observed`)."""

    def __init__(self) -> None:
        self._right: list[Tensor] = []
        self._hidden: list[Tensor] = []

    def add(self, batch: Batch, outputs: Signals) -> None:
        """Take the logits (N, C) of a graph, its `label` (N,), -100 outside the split, and `hidden` (N,), bool."""
        logits, label = outputs.require("logits"), batch["label"]
        judged = label != IGNORED
        self._right.append((logits.argmax(-1) == label)[judged])
        self._hidden.append(batch["hidden"][judged])

    def figures(self) -> dict[str, float]:
        right, hidden = (torch.cat(parts) for parts in (self._right, self._hidden))
        if not len(right):
            raise UserError("There are no nodes to judge by: the split is empty.")
        parts = {"accuracy": right}
        if bool(hidden.any()):
            parts |= {"accuracy_hidden": right[hidden], "accuracy_observed": right[~hidden]}
        return {name: part.double().mean().item() for name, part in parts.items()}
