"""`pyramid_detector`: a one-stage detector on any backbone of timm, such as EfficientNet-Lite0 with its published
weights: a small feature pyramid, and heads at strides 8, 16 and 32."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.models.grid_detector import GridDetector
from stillhouse.models.registry import register
from stillhouse.models.sources import check_timm
from stillhouse.models.weights import read_state

STRIDES = (8, 16, 32)
PUBLISHED = "published"


def _block(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.SiLU())


@register({"pyramid_detector": {}})
class PyramidDetector(GridDetector):
    """A backbone, 1x1 convolutions to one width, sums from coarse to fine, a 3x3 convolution and a head each. Stages
    are `smooth.0` (stride 8) to `smooth.2` (stride 32).

    Args:
        num_classes: K.
        input_shape: (channels, height, width).
        backbone: a timm model that gives maps at strides 8, 16 and 32.
        backbone_weights: `published` (timm's, downloaded), or a file with the state dict of the timm classifier, as
            given or under STILLHOUSE_DATA; None: random. A product is loaded without them.
        width: channels of the pyramid.
        anchors, gains, overlap: as of every `GridDetector`.

    Raises:
        UserError: a backbone without such maps, or weights of another network.
    """

    def __init__(
        self,
        num_classes: int = 3,
        input_shape: tuple[int, ...] = (3, 96, 128),
        backbone: str = "tf_efficientnet_lite0",
        backbone_weights: str | None = None,
        width: int = 64,
        anchors: Sequence[Sequence[Sequence[float]]] | None = None,
        gains: Sequence[float] = (2.0, 20.0, 1.0),
        overlap: float = 0.5,
    ) -> None:
        super().__init__(num_classes, STRIDES, anchors, gains, overlap)
        name = backbone.removeprefix("timm:")
        check_timm(name)
        published = backbone_weights == PUBLISHED
        self.backbone = timm.create_model(name, features_only=True, in_chans=input_shape[0], pretrained=published)
        info: Any = self.backbone.feature_info
        places = {r: i for i, r in enumerate(info.reduction())}
        if not set(STRIDES) <= set(places):
            raise UserError(
                f"options.backbone: '{backbone}' gives maps at strides {info.reduction()}, but the pyramid needs 8, 16 "
                "and 32; take a convolutional backbone such as tf_efficientnet_lite0 or resnet18."
            )
        self._places = [places[s] for s in STRIDES]
        if backbone_weights is not None and not published:
            load_backbone(self.backbone, backbone_weights, name)
        channels = info.channels()
        self.lateral = nn.ModuleList(_block(channels[i], width, 1) for i in self._places)
        self.smooth = nn.ModuleList(_block(width, width) for _ in STRIDES)
        self.heads = nn.ModuleList(self.head(width) for _ in STRIDES)
        self.stage_names = [f"smooth.{i}" for i in range(len(STRIDES))]

    def grids(self, images: Tensor) -> list[Tensor]:
        """The heads' numbers at strides 8, 16 and 32."""
        features = self.backbone(images)
        maps = [lateral(features[i]) for lateral, i in zip(self.lateral, self._places)]
        for i in (1, 0):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], size=maps[i].shape[-2:], mode="nearest")
        return [self.as_grid(head(smooth(x))) for head, smooth, x in zip(self.heads, self.smooth, maps)]


def load_backbone(backbone: nn.Module, path: str, name: str) -> None:
    """Load a classifier's state dict into its backbone, without the classifier.

    Raises:
        UserError: no such file, or weights of another network.
    """
    places = [Path(path).expanduser(), Path(os.environ.get("STILLHOUSE_DATA", ".")).expanduser() / path]
    file = next((p for p in places if p.is_file()), places[0])
    given, ours = read_state(file, f"backbone '{name}'"), backbone.state_dict()
    wrong = [
        k
        for k, v in ours.items()
        if not k.endswith("num_batches_tracked") and (k not in given or given[k].shape != v.shape)
    ]
    if wrong:
        raise UserError(
            f"options.backbone_weights: '{file}' does not fit '{name}': {len(wrong)} of its {len(ours)} tensors are "
            f"missing or of another shape, such as '{wrong[0]}'."
        )
    backbone.load_state_dict({k: v for k, v in given.items() if k in ours}, strict=False)
