"""DenseNet-121 for 32 px images (Huang et al., CVPR 2017, arXiv 1608.06993): the published blocks behind a 3x3 stem, so
that maps end at 4 x 4.

Stages are `layer1` … `layer4`, each a dense block; the transitions between them are `down1` … `down3`, the last norm is
`norm`, the classifier `fc`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.models.registry import register


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1 convolution to 4 times the growth, norm, ReLU, 3x3 convolution; the result follows the input's
    channels."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))], 1)


def transition(inputs: int, outputs: int) -> nn.Sequential:
    """Norm, ReLU, 1x1 convolution, and the mean of 2x2."""
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 1, bias=False), nn.AvgPool2d(2))


@register({"densenet121": {"depths": (6, 12, 24, 16), "growth": 32}})
class DenseNet(nn.Module):
    """3x3 stem, dense blocks with halving transitions between them, norm, mean over space, `fc`.

    Args:
        depths: layers of each block.
        growth: channels that a layer adds.
        num_classes: C.
        input_shape: (channels, height, width).
    """

    def __init__(
        self, depths: tuple[int, ...], growth: int, num_classes: int = 10, input_shape: tuple[int, ...] = (3, 32, 32)
    ) -> None:
        super().__init__()
        channels = 2 * growth
        self.conv1 = nn.Conv2d(input_shape[0], channels, 3, 1, 1, bias=False)
        self.stage_names = [f"layer{i + 1}" for i in range(len(depths))]
        for i, (name, depth) in enumerate(zip(self.stage_names, depths)):
            if i:
                setattr(self, f"down{i}", transition(channels, channels // 2))
                channels //= 2
            setattr(self, name, nn.Sequential(*(DenseLayer(channels + j * growth, growth) for j in range(depth))))
            channels += depth * growth
        self.norm = nn.BatchNorm2d(channels)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, classes) logits."""
        x = self.conv1(x)
        for i, name in enumerate(self.stage_names):
            if i:
                x = getattr(self, f"down{i}")(x)
            x = getattr(self, name)(x)
        return self.fc(self.avgpool(F.relu(self.norm(x))).flatten(1))
