"""Classification: one class a sample, of images or of inputs of any shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError
from stillhouse.models import build
from stillhouse.signals import Batch
from stillhouse.tasks.base import Task


@dataclass(frozen=True)
class Classification(Task):
    """Logits (B, C), labels (B,) class ids or (B, C) soft.

    Attributes:
        classes: names, in label order.
        input_shape: of one sample, (C, H, W) for images; () where inputs are mappings of tensors.
        mean, std: the normalisation per channel; () for inputs used as they are.
    """

    name: ClassVar[str] = "classification"
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes

    def build(self, spec: ModelSpec) -> nn.Module:
        return build(spec, len(self.classes), self.input_shape)

    def example(self) -> Batch:
        if not self.input_shape:
            raise UserError("The model takes several tensors by name, so only its weights can be exported: use the format safetensors.")
        return {"input": torch.zeros(1, *self.input_shape)}
