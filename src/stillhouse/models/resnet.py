"""ResNets for 32 px images (He et al., arXiv 1512.03385), as the distillation papers use them on CIFAR (CRD, arXiv
1910.10699).

Three-stage nets of 6n+2 layers (`resnet20`, `resnet8x4`, …; 1x1 convolutions as shortcuts, or with `shortcut: pad` the
parameter-free ones of He et al.) and the four-stage nets with a 3x3 stem (`resnet18`, …). Stages are `layer1` …, each
output after its ReLU; `layer3.2.relu:in` is a block's output before it. The classifier is `fc`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.models.initialisation import he_fan_out
from stillhouse.models.registry import register

Shortcut = Literal["conv", "pad"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, kind: Shortcut = "conv") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(inputs, width, stride, kind)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution that widens four times, and a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, kind: Shortcut = "conv") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = shortcut(inputs, 4 * width, stride, kind)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class PaddedShortcut(nn.Module):
    """Every second pixel, and channels of zeros before and after, as many on either side: option A of He et al."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        if outputs < inputs or (outputs - inputs) % 2:
            raise UserError(
                f"shortcut: pad adds channels on both sides alike, so it cannot make {outputs} of {inputs}; choose "
                "widths that rise by even numbers."
            )
        self.stride, self.added = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))


def shortcut(inputs: int, outputs: int, stride: int, kind: Shortcut = "conv") -> nn.Module:
    """The identity; where the shape changes, a 1x1 convolution with batch norm, or `PaddedShortcut`."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if kind == "pad":
        return PaddedShortcut(inputs, outputs, stride)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """Stem, stages of residual blocks (each after the first halves the map), mean over space, `fc`.

    Args:
        stem: channels of the 3x3 stem.
        widths: channels of each stage (before a bottleneck's expansion).
        depths: blocks of each stage.
        bottleneck: blocks are `Bottleneck`, not `BasicBlock`.
        num_classes: C.
        input_shape: (channels, height, width).
        stem_stride: of the first convolution; 2 makes the whole net four times cheaper.
        shortcut: where a stage begins, a 1x1 convolution, or `pad` without parameters.
    """

    published_names: ClassVar[dict[str, str]] = {r"\bshortcut\.": "downsample.", r"^linear\.": "fc."}

    def __init__(
        self,
        stem: int,
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        bottleneck: bool = False,
        num_classes: int = 10,
        input_shape: tuple[int, ...] = (3, 32, 32),
        stem_stride: int = 1,
        shortcut: Shortcut = "conv",
    ) -> None:
        super().__init__()
        block = Bottleneck if bottleneck else BasicBlock
        self.conv1 = nn.Conv2d(input_shape[0], stem, 3, stem_stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.stage_names = [f"layer{i + 1}" for i in range(len(widths))]
        inputs = stem
        for i, (name, width, depth) in enumerate(zip(self.stage_names, widths, depths)):
            blocks = []
            for j in range(depth):
                blocks.append(block(inputs, width, 2 if i > 0 and j == 0 else 1, shortcut))
                inputs = width * block.expansion
            setattr(self, name, nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        he_fan_out(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, classes) logits."""
        x = self.relu(self.bn1(self.conv1(x)))
        for name in self.stage_names:
            x = getattr(self, name)(x)
        return self.fc(self.avgpool(x).flatten(1))


def _six_n_plus_two(depth: int, factor: int) -> dict[str, object]:
    blocks = (depth - 2) // 6
    return {
        "stem": 16 if factor == 1 else 8 * factor,
        "widths": (16 * factor, 32 * factor, 64 * factor),
        "depths": (blocks,) * 3,
        "bottleneck": False,
    }


register({f"resnet{depth}": _six_n_plus_two(depth, 1) for depth in (8, 14, 20, 32, 44, 56, 110)})(ResNet)
register({f"resnet{depth}x4": _six_n_plus_two(depth, 4) for depth in (8, 32)})(ResNet)
register({"resnet_stages": {"bottleneck": False}})(ResNet)  # of any shape: options stem, widths, depths
register(
    {
        name: {"stem": 64, "widths": (64, 128, 256, 512), "depths": depths, "bottleneck": name == "resnet50"}
        for name, depths in {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}.items()
    }
)(ResNet)
