"""Features: a network without its classifier, which embeds images; no labels are needed to train one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from stillhouse.config.specs import ModelSpec
from stillhouse.evaluation.features import GROUPS, FeatureMeter
from stillhouse.evaluation.judge import Meter
from stillhouse.models import load_weights
from stillhouse.models.backbone import backbone
from stillhouse.signals import Batch, Signals, read_logits
from stillhouse.tasks.base import WEIGHTS, Task
from stillhouse.tasks.classification import fitted


@dataclass(frozen=True)
class Features(Task):
    """Embeddings (B, D) of images. Labels, where the test images have any, are used by probes alone.

    Attributes:
        classes: names of the classes that probes tell apart; () where no image has a label.
        input_shape: of one image, (C, H, W).
        mean, std: the normalisation per channel.
    """

    name: ClassVar[str] = "features"
    reads: ClassVar[str] = "images"
    embeds: ClassVar[bool] = True
    supervised: ClassVar[tuple[str | dict[str, Any], ...]] = ()
    groups: ClassVar[tuple[str, ...]] = GROUPS
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.mean, self.std

    def build(self, spec: ModelSpec) -> nn.Module:
        """The network without its last layer, as a `Backbone`."""
        return backbone(spec, self.input_shape)

    def read(self, output: Any, batch: Batch) -> Signals:
        return Signals(embedding=read_logits(output))

    def meter(self, groups: Sequence[str]) -> Meter:
        return FeatureMeter(groups)

    def example(self) -> Batch:
        return {"input": torch.zeros(1, *self.input_shape)}

    def for_export(self, module: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
        return module, ("embedding",)

    def save_module(self, module: nn.Module, folder: Path) -> None:
        """The weights in the network's own names, as its library loads a network without a classifier."""
        super().save_module(module.network, folder)  # type: ignore[arg-type]

    def load_module(self, spec: ModelSpec, folder: Path) -> nn.Module:
        module = backbone(spec, self.input_shape)
        load_weights(module.network, folder / WEIGHTS, owner=f"model {spec.model}")
        return module.eval()

    @torch.no_grad()
    def predict(self, module: nn.Module, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """Of each uint8 image (C, H, W): its `embedding`."""
        x = fitted(inputs, self.input_shape, self.mean, self.std).to(next(module.parameters()).device)
        return [{"embedding": [round(v, 6) for v in row.tolist()]} for row in module(x).float().cpu()]
