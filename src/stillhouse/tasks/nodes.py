"""Nodes: one class a node of a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from stillhouse.config.specs import ModelSpec
from stillhouse.models import build
from stillhouse.signals import Batch
from stillhouse.tasks.base import Task


@dataclass(frozen=True)
class Nodes(Task):
    """Logits (N, C) of all nodes; labels (N,), -100 outside the split. A student that does without the graph reads features (N, D) alone.

    Attributes:
        classes: names, in label order.
        features: D.
    """

    name: ClassVar[str] = "nodes"
    classes: tuple[str, ...]
    features: int

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes

    def build(self, spec: ModelSpec) -> nn.Module:
        return build(spec, len(self.classes), (self.features,))

    def example(self) -> Batch:
        return {"input": torch.zeros(1, self.features)}
