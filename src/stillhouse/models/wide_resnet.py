"""Wide residual networks (Zagoruyko and Komodakis, arXiv 1605.07146) for 32 px images: `wrn_D_K` has D = 6n+4 layers
and widening factor K.

Pre-activation blocks: a stage's output (`layer1` … `layer3`) is a sum, before the next batch norm and ReLU. The
classifier is `fc`.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.models.initialisation import he_fan_out
from stillhouse.models.registry import register


class PreActivationBlock(nn.Module):
    """Batch norm, ReLU, 3x3 convolution, twice; where the width changes, the shortcut is a 1x1 convolution of the
    activated input."""

    def __init__(self, inputs: int, width: int, stride: int, slope: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = rectifier(slope)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = rectifier(slope)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = None if inputs == width else nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        out = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


def rectifier(slope: float) -> nn.Module:
    """A ReLU, or one that is leaky with this slope."""
    return nn.LeakyReLU(slope) if slope else nn.ReLU()


@register(
    {
        f"wrn_{depth}_{factor}": {"depth": depth, "factor": factor}
        for depth, factor in [(16, 1), (16, 2), (40, 1), (40, 2), (28, 10)]
    },
    pattern=r"wrn_(\d+)_(\d+)",
    fixes=lambda depth, factor: {"depth": depth, "factor": factor},
)
class WideResNet(nn.Module):
    """Stem, three stages of pre-activation blocks, batch norm, ReLU, mean over space, `fc`.

    Args:
        depth: 6n+4 layers.
        factor: stages have 16, 32 and 64 times this many channels.
        num_classes: C.
        input_shape: (channels, height, width).
        slope: of leaky ReLUs; 0: plain ones.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    published_names: ClassVar[dict[str, str]] = {r"^block(\d)\.layer\.": r"layer\1.", r"\.convShortcut\.": ".shortcut."}

    def __init__(
        self,
        depth: int,
        factor: int,
        num_classes: int = 10,
        input_shape: tuple[int, ...] = (3, 32, 32),
        slope: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or factor < 1:
            raise UserError(
                "A wide ResNet wrn_D_K has depth D = 6n+4 (10, 16, 22, 28, 34, 40, …) and factor K of 1 or more; "
                f"given: wrn_{depth}_{factor}."
            )
        self.conv1 = nn.Conv2d(input_shape[0], 16, 3, 1, 1, bias=False)
        self.stage_names = ["layer1", "layer2", "layer3"]
        inputs = 16
        for i, name in enumerate(self.stage_names):
            width, stride = 16 * 2**i * factor, 1 if i == 0 else 2
            blocks = [
                PreActivationBlock(inputs if j == 0 else width, width, stride if j == 0 else 1, slope)
                for j in range((depth - 4) // 6)
            ]
            setattr(self, name, nn.Sequential(*blocks))
            inputs = width
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu = rectifier(slope)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        he_fan_out(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, classes) logits."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(self.avgpool(self.relu(self.bn1(x))).flatten(1))
