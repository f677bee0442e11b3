"""`pyramid_segmenter`: maps of class scores from any backbone of timm, such as EfficientNet-Lite0 with its published
weights, by a small feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.models.pyramid_detector import PUBLISHED, load_backbone
from stillhouse.models.registry import register
from stillhouse.models.sources import check_timm


@register({"pyramid_segmenter": {}})
class PyramidSegmenter(nn.Module):
    """A backbone, 1x1 convolutions to one width, sums from coarse to fine, 3x3 convolutions, and a 1x1 classifier at
    the finest stride. The last features are `decoder`'s output.

    Args:
        num_classes: K.
        input_shape: (channels, height, width).
        backbone: a timm model that gives maps at these strides.
        backbone_weights: `published` (timm's, downloaded), or a file with the state dict of the timm classifier, as
            given or under STILLHOUSE_DATA; None: random. A product is loaded without them.
        strides: of the maps that are used, finest first; what of the backbone lies deeper is left out.
        width: channels of the pyramid.
        depth: 3x3 convolutions of the decoder.

    Raises:
        UserError: a backbone without such maps, or weights of another network.
    """

    def __init__(
        self,
        num_classes: int = 2,
        input_shape: tuple[int, ...] = (3, 96, 128),
        backbone: str = "tf_efficientnet_lite0",
        backbone_weights: str | None = None,
        strides: Sequence[int] = (4, 8, 16, 32),
        width: int = 64,
        depth: int = 1,
    ) -> None:
        super().__init__()
        name = backbone.removeprefix("timm:")
        check_timm(name)
        made: Any = timm.create_model(name, features_only=True)
        places = {r: i for i, r in enumerate(made.feature_info.reduction())}
        if not strides or not set(strides) <= set(places):
            raise UserError(
                f"options.strides: '{backbone}' gives maps at strides {made.feature_info.reduction()}, not at "
                f"{list(strides)}."
            )
        published = backbone_weights == PUBLISHED
        options: dict[str, Any] = {"out_indices": [places[s] for s in sorted(strides)], "in_chans": input_shape[0]}
        self.backbone = timm.create_model(name, features_only=True, pretrained=published, **options)
        if backbone_weights is not None and not published:
            load_backbone(self.backbone, backbone_weights, name)
        info: Any = self.backbone.feature_info
        self.lateral = nn.ModuleList(_block(channels, width, 1) for channels in info.channels())
        self.decoder = nn.Sequential(*(_block(width, width) for _ in range(depth)))
        self.classifier = nn.Conv2d(width, num_classes, 1)
        self.stage_names = [f"lateral.{i}" for i in range(len(strides))]

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> scores (B, K, h, w) at the finest stride."""
        maps = [lateral(x) for lateral, x in zip(self.lateral, self.backbone(images))]
        top: Tensor = maps[-1]
        for x in reversed(maps[:-1]):
            top = x + F.interpolate(top, size=x.shape[-2:], mode="bilinear", align_corners=False)
        out: Tensor = self.classifier(self.decoder(top))
        return out


def _block(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())
