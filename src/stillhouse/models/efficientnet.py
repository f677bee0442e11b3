"""EfficientNet-B0 for 32 px images (Tan and Le, ICML 2019, arXiv 1905.11946): the published blocks behind a stem of
stride 1, so that maps end at 2 x 2.

Without dropout and stochastic depth. The stem is `conv1`, stages are `blocks.i`, the classifier is `fc`.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from stillhouse.models.initialisation import he_fan_out
from stillhouse.models.registry import register


class SqueezeExcite(nn.Module):
    """Channels weighted by a sigmoid of two 1x1 convolutions of their means."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv1 = nn.Conv2d(channels, squeezed, 1)
        self.act = nn.SiLU()
        self.conv2 = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.conv2(self.act(self.conv1(self.pool(x)))))


class MBConv(nn.Module):
    """1x1 convolution that widens (not at expansion 1), depthwise, squeeze and excite, 1x1 without activation; a
    shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.keeps_shape = stride == 1 and inputs == outputs
        self.conv = nn.Sequential()
        if expansion > 1:
            self.conv.extend([nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.SiLU()])
        self.conv.extend(
            [
                nn.Conv2d(inner, inner, kernel, stride, kernel // 2, groups=inner, bias=False),
                nn.BatchNorm2d(inner),
                nn.SiLU(),
            ]
        )
        self.conv.extend(
            [
                SqueezeExcite(inner, max(1, inputs // 4)),
                nn.Conv2d(inner, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.keeps_shape else self.conv(x)


@register({"efficientnet_b0": {}})
class EfficientNetB0(nn.Module):
    """3x3 stem of stride 1, seven groups of blocks (`blocks.0` … `blocks.6`), `conv2` to 1280 channels, mean over
    space, `fc`.

    Args:
        num_classes: C.
        input_shape: (channels, height, width).
    """

    # expansion, channels, repeats, stride of the first, kernel
    groups: ClassVar[list[tuple[int, int, int, int, int]]] = [
        (1, 16, 1, 1, 3),
        (6, 24, 2, 2, 3),
        (6, 40, 2, 2, 5),
        (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5),
        (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    ]

    def __init__(self, num_classes: int = 10, input_shape: tuple[int, ...] = (3, 32, 32)) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(input_shape[0], 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.SiLU())
        self.blocks = nn.Sequential()
        inputs = 32
        for expansion, outputs, repeats, stride, kernel in self.groups:
            group = [
                MBConv(inputs if i == 0 else outputs, outputs, kernel, stride if i == 0 else 1, expansion)
                for i in range(repeats)
            ]
            self.blocks.append(nn.Sequential(*group))
            inputs = outputs
        self.conv2 = nn.Sequential(nn.Conv2d(inputs, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.SiLU())
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1280, num_classes)
        self.stage_names = ["blocks.1", "blocks.2", "blocks.4", "blocks.6"]
        he_fan_out(self, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, classes) logits."""
        return self.fc(self.avgpool(self.conv2(self.blocks(self.conv1(x)))).flatten(1))
