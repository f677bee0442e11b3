"""Classification: one class a sample, of images or of inputs of any shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError
from stillhouse.evaluation.classification import FREQUENCY, GROUPS, ClassificationMeter
from stillhouse.evaluation.judge import Meter
from stillhouse.functional.pictures import centre, normalise, unnormalise, with_channels
from stillhouse.models import build
from stillhouse.models.class_names import put_in_order
from stillhouse.signals import Batch, Signals
from stillhouse.tasks.base import Task


@dataclass(frozen=True)
class Classification(Task):
    """Logits (B, C), labels (B,) class ids or (B, C) soft.

    Attributes:
        classes: names, in label order.
        input_shape: of one sample, (C, H, W) for images; () where inputs are mappings of tensors.
        mean, std: the normalisation per channel; () for inputs used as they are.
        train_counts: of long-tailed data, the training samples of each class, by which classes are judged in groups.
    """

    name: ClassVar[str] = "classification"
    reads: ClassVar[str] = "images"
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    train_counts: tuple[int, ...] = ()

    @property
    def groups(self) -> tuple[str, ...]:
        return (*GROUPS, FREQUENCY) if self.train_counts else GROUPS

    def meter(self, groups: Sequence[str]) -> Meter:
        return ClassificationMeter(groups, self.train_counts)

    def facts(self, folder: Path) -> dict[str, Any]:
        found = super().facts(folder)
        return found if self.train_counts else {k: v for k, v in found.items() if k != "train_counts"}

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.mean, self.std

    def build(self, spec: ModelSpec) -> nn.Module:
        model = build(spec, len(self.classes), self.input_shape)
        put_in_order(model, self.classes, spec.model, self.input_shape)
        return model

    def example(self) -> Batch:
        if not self.input_shape:
            raise UserError(
                "The model takes several tensors by name, so only its weights can be exported: use the format "
                "safetensors."
            )
        return {"input": torch.zeros(1, *self.input_shape)}

    @torch.no_grad()
    def predict(self, module: nn.Module, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """For each uint8 image (C, H, W): its `label`, and the five largest `probs` by class name."""
        x = fitted(inputs, self.input_shape, self.mean, self.std).to(next(module.parameters()).device)
        logits = self.read(self.call(module, {"input": x}), {"input": x}).require("logits")
        found = []
        for probs in logits.float().softmax(-1).cpu():
            top = probs.topk(min(5, len(probs)))
            by_name = {self.classes[i]: round(p, 4) for p, i in zip(top.values.tolist(), top.indices.tolist())}
            found.append({"label": next(iter(by_name)), "probs": by_name})
        return found

    def pictures(self, batch: Batch, outputs: Signals) -> list[Tensor]:
        if len(self.input_shape) != 3 or not self.mean or self.input_shape[0] not in (1, 3):
            return []
        images = unnormalise(batch["input"].cpu(), self.mean, self.std)
        times = max(1, 96 // max(self.input_shape[-2:]))
        return [with_channels(x, 3).repeat_interleave(times, 1).repeat_interleave(times, 2) for x in images]

    def truth(self, batch: Batch) -> list[Tensor]:
        return self.pictures(batch, Signals())

    def captions(self, batch: Batch, outputs: Signals | None) -> list[str]:
        if outputs is None:
            return [self.classes[i] for i in batch["label"].tolist()]
        best = outputs.log_probs().exp().max(-1)
        return [f"{self.classes[i]} ({p:.0%})" for p, i in zip(best.values.tolist(), best.indices.tolist())]


def fitted(images: Sequence[Tensor], shape: tuple[int, ...], mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Images uint8 (C, H, W) of any size as a classifier's input (B, C, H, W). Raises `UserError` for inputs that are
    no images."""
    if len(shape) != 3 or not mean:
        raise UserError(
            f"Only classifiers of images predict for people; this one takes inputs of shape {shape}: call its module."
        )
    channels, height, width = shape
    return normalise(torch.stack([centre(with_channels(x, channels), (height, width)) for x in images]), mean, std)
