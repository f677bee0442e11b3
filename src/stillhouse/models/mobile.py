"""Mobile nets for 32 px images, by default as in CRD's CIFAR experiments (arXiv 1910.10699): MobileNetV2 at half width,
ShuffleNet V1 (3 groups), V2 (1x).

MobileNetV2: arXiv 1801.04381; ShuffleNet: arXiv 1707.01083 and 1807.11164. All start at full or half resolution with a
small stem, `conv1`; stages are `blocks.i` or `layer1` … `layer3`; the classifier is `fc`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.models.initialisation import he_fan_out
from stillhouse.models.registry import register


class InvertedResidual(nn.Module):
    """1x1 convolution that widens, 3x3 depthwise, 1x1 that narrows without activation; a shortcut where the shape
    stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.keeps_shape = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.keeps_shape else self.conv(x)


@register({"mobilenet_v2": {}})
class MobileNetV2(nn.Module):
    """Stem, seven groups of inverted residuals (`blocks.0` … `blocks.6`), `conv2` to 1280 channels, mean over space,
    `fc`.

    Args:
        width: factor on the channels of stem and blocks; the papers' 0.5.
        num_classes: C.
        input_shape: (channels, height, width).
        stem_stride: CRD's 2; 1 keeps 4 x 4 pixels to the end at 32 px.
    """

    published_names: ClassVar[dict[str, str]] = {r"^classifier\.0\.": "fc."}
    # expansion, channels at width 1, repeats, stride of the first
    groups: ClassVar[list[tuple[int, int, int, int]]] = [
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]

    def __init__(
        self,
        width: float = 0.5,
        num_classes: int = 10,
        input_shape: tuple[int, ...] = (3, 32, 32),
        stem_stride: int = 2,
    ) -> None:
        super().__init__()
        inputs, last = int(32 * width), int(1280 * max(width, 1.0))
        self.conv1 = nn.Sequential(
            nn.Conv2d(input_shape[0], inputs, 3, stem_stride, 1, bias=False), nn.BatchNorm2d(inputs), nn.ReLU()
        )
        self.blocks = nn.Sequential()
        for expansion, channels, repeats, stride in self.groups:
            outputs = int(channels * width)
            group = [
                InvertedResidual(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1, expansion)
                for i in range(repeats)
            ]
            self.blocks.append(nn.Sequential(*group))
            inputs = outputs
        self.conv2 = nn.Sequential(nn.Conv2d(inputs, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU())
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last, num_classes)
        self.stage_names = ["blocks.1", "blocks.2", "blocks.4", "blocks.6"]
        he_fan_out(self, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, classes) logits."""
        return self.fc(self.avgpool(self.conv2(self.blocks(self.conv1(x)))).flatten(1))


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """(B, C, H, W) with its channels interleaved over the groups: channel (g, c) goes to (c, g)."""
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class ShuffleUnitV1(nn.Module):
    """Grouped 1x1, shuffle, 3x3 depthwise, grouped 1x1; added to the input, or at stride 2 concatenated with its
    mean."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int = 3, stem: int = 24) -> None:
        super().__init__()
        self.stride, self.groups = stride, 1 if inputs == stem else groups
        grown = outputs - inputs if stride == 2 else outputs
        middle = grown // 4
        self.conv1 = nn.Conv2d(inputs, middle, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, grown, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(grown)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = shuffle_channels(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        if self.stride == 2:
            return self.relu(torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1))
        return self.relu(out + x)


@register({"shufflenet_v1": {}})
class ShuffleNetV1(nn.Module):
    """1x1 stem, three stages of 4, 8 and 4 units with 240, 480 and 960 channels (of 3 groups), mean over space, `fc`.

    Args:
        num_classes: C.
        input_shape: (channels, height, width).
        groups: of the 1x1 convolutions, 1, 2 or 3; each has channels of its own, so that nets of all are about as
            costly.

    Raises:
        UserError: another number of groups.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    published_names: ClassVar[dict[str, str]] = {r"^linear\.": "fc."}
    channels: ClassVar[dict[int, int]] = {1: 144, 2: 200, 3: 240}  # of the first stage, by groups

    def __init__(self, num_classes: int = 10, input_shape: tuple[int, ...] = (3, 32, 32), groups: int = 3) -> None:
        super().__init__()
        if groups not in self.channels:
            raise UserError(f"options.groups of shufflenet_v1 must be 1, 2 or 3; given: {groups}.")
        self.conv1 = nn.Conv2d(input_shape[0], 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.stage_names = ["layer1", "layer2", "layer3"]
        inputs = 24
        for name, factor, depth in zip(self.stage_names, (1, 2, 4), (4, 8, 4)):
            width = factor * self.channels[groups]
            units = [
                ShuffleUnitV1(inputs if i == 0 else width, width, 2 if i == 0 else 1, groups) for i in range(depth)
            ]
            setattr(self, name, nn.Sequential(*units))
            inputs = width
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, classes) logits."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(self.avgpool(x).flatten(1))


class ShuffleUnitV2(nn.Module):
    """Half of the channels pass, half go through 1x1, 3x3 depthwise and 1x1; then the halves are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        passed, x = x.chunk(2, dim=1)
        x = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return shuffle_channels(torch.cat([passed, F.relu(self.bn3(self.conv3(x)))], dim=1), 2)


class ShuffleDownV2(nn.Module):
    """Both branches halve the map: 3x3 depthwise and 1x1 (`conv1`, `conv2`); 1x1, 3x3 depthwise and 1x1 (`conv3` …
    `conv5`)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1 = nn.Conv2d(inputs, inputs, 3, 2, 1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = nn.Conv2d(inputs, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(inputs, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        return shuffle_channels(torch.cat([left, F.relu(self.bn5(self.conv5(right)))], dim=1), 2)


@register({"shufflenet_v2": {}})
class ShuffleNetV2(nn.Module):
    """1x1 stem, three stages with 116, 232 and 464 channels (a halving unit, then 3, 7 and 3), `conv2` to 1024, mean
    over space, `fc`.

    Args:
        num_classes: C.
        input_shape: (channels, height, width).
        size: the published 0.5 (48, 96 and 192 channels), 1 or 1.5 (176, 352 and 704).

    Raises:
        UserError: another size.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    published_names: ClassVar[dict[str, str]] = {r"^linear\.": "fc."}

    channels: ClassVar[dict[float, int]] = {0.5: 48, 1.0: 116, 1.5: 176}  # of the first stage, by size

    def __init__(self, num_classes: int = 10, input_shape: tuple[int, ...] = (3, 32, 32), size: float = 1.0) -> None:
        super().__init__()
        if size not in self.channels:
            raise UserError(f"options.size of shufflenet_v2 must be 0.5, 1 or 1.5; given: {size}.")
        self.conv1 = nn.Conv2d(input_shape[0], 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.stage_names = ["layer1", "layer2", "layer3"]
        inputs = 24
        for name, factor, depth in zip(self.stage_names, (1, 2, 4), (3, 7, 3)):
            width = factor * self.channels[size]
            setattr(
                self, name, nn.Sequential(ShuffleDownV2(inputs, width), *(ShuffleUnitV2(width) for _ in range(depth)))
            )
            inputs = width
        self.conv2 = nn.Conv2d(inputs, 1024, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1024)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, classes) logits."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(self.avgpool(F.relu(self.bn2(self.conv2(x)))).flatten(1))
