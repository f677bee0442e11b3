"""The ConvNet of data-set distillation (Zhao et al., arXiv 2006.05929; Cazenavette et al., arXiv 2203.11932) and a
plain perceptron.

Stages are `layer1` …; a ConvNet's stage holds `conv`, `norm`, `act` and `pool` (`layer2.act` is its activation map).
The classifier is `fc`; its input, flattened, is the embedding.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError, unknown
from stillhouse.models.conv_block import Block, Convolution, InstanceNorm, channels_last
from stillhouse.models.registry import register

Norm = Literal["instance", "batch", "layer", "group", "none"]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "leaky_relu": lambda: nn.LeakyReLU(0.01),
}
POOLS: dict[str, Callable[[], nn.Module]] = {
    "avg": lambda: nn.AvgPool2d(2),
    "max": lambda: nn.MaxPool2d(2),
    "none": nn.Identity,
}


@register(
    {"convnet": {}} | {f"convnet{d}": {"depth": d} for d in (2, 3, 4, 5)},
    pattern=r"convnet(\d+)",
    fixes=lambda depth: {"depth": depth},
)
class ConvNet(nn.Module):
    """Blocks of [3x3 convolution, norm, activation, 2x2 pooling], flattened, and `fc`. Torch's default initialisation.

    An image with one channel is padded by 3, not 1, in the first convolution (28 px become 32), as in the published
    code.

    Args:
        width: channels of each block: one number for all, or a list of as many as there are blocks.
        depth: blocks; 3 for 32 px, 4 for 64 px, 5 for 128 px.
        norm: `instance` (one group a channel, with weight and bias), `batch`, `layer`, `group` (4 groups) or `none`.
        act: `relu`, `sigmoid` or `leaky_relu`.
        pool: `avg`, `max` or `none`.
        num_classes: C.
        input_shape: (channels, height, width).

    Raises:
        UserError: more blocks than the image has room for (a norm would see a single pixel and give only its bias).
    """

    def __init__(
        self,
        width: int | Sequence[int] = 128,
        depth: int = 3,
        norm: Norm = "instance",
        act: str = "relu",
        pool: str = "avg",
        num_classes: int = 10,
        input_shape: tuple[int, ...] = (3, 32, 32),
    ) -> None:
        super().__init__()
        channels, height, breadth = input_shape
        for option, value, valid in (("norm", norm, get_args(Norm)), ("act", act, ACTIVATIONS), ("pool", pool, POOLS)):
            if value not in valid:
                raise unknown(f"ConvNet options.{option}", str(value), valid)
        widths = [width] * depth if isinstance(width, int) else list(width)
        if depth < 1 or min(widths, default=1) < 1:
            raise UserError(
                f"A ConvNet needs options.width and options.depth of 1 or more; given: width {width}, depth {depth}."
            )
        if len(widths) != depth:
            raise UserError(f"A ConvNet of depth {depth} needs one options.width, or {depth} of them; given: {widths}.")
        self.stage_names = [f"layer{i + 1}" for i in range(depth)]
        for i, name in enumerate(self.stage_names):
            padding = 3 if i == 0 and channels == 1 else 1
            if padding == 3:
                height, breadth = height + 4, breadth + 4
            if height * breadth < 2:
                raise UserError(
                    f"A ConvNet of depth {depth} is too deep for images of {input_shape[1]} x {input_shape[2]}: block "
                    f"{i + 1} would see a single pixel."
                )
            parts: list[tuple[str, nn.Module]] = [
                (
                    "conv",
                    (Convolution if i else nn.Conv2d)(widths[i - 1] if i else channels, widths[i], 3, padding=padding),
                ),
                ("norm", _norm(norm, widths[i], height, breadth)),
                ("act", ACTIVATIONS[act]()),
                ("pool", POOLS[pool]()),
            ]
            setattr(self, name, Block(OrderedDict(parts)))
            if pool != "none":
                height, breadth = height // 2, breadth // 2
        self.fc = nn.Linear(widths[-1] * height * breadth, num_classes)

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images to the (B, last width * h * w) input of the classifier."""
        x = channels_last(x)
        for name in self.stage_names:
            x = getattr(self, name)(x)
        return x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, classes) logits."""
        return self.fc(self.embed(x))


def _norm(name: Norm, width: int, height: int, breadth: int) -> nn.Module:
    if name == "instance":
        return InstanceNorm(width)
    if name == "batch":
        return nn.BatchNorm2d(width)
    if name == "layer":
        return nn.LayerNorm([width, height, breadth])
    if name == "group":
        return nn.GroupNorm(4, width)
    return nn.Identity()


@register({"mlp": {}})
class MLP(nn.Module):
    """A perceptron on the flattened input: `layer1` … are [linear, ReLU], `fc` is the classifier.

    Args:
        widths: units of each hidden layer; none is a linear classifier.
        num_classes: C.
        input_shape: shape of one sample.
    """

    def __init__(
        self, widths: Sequence[int] = (256, 256), num_classes: int = 10, *, input_shape: tuple[int, ...]
    ) -> None:
        super().__init__()
        inputs = math.prod(input_shape)
        self.stage_names = [f"layer{i + 1}" for i in range(len(widths))]
        for name, width in zip(self.stage_names, widths):
            setattr(self, name, nn.Sequential(nn.Linear(inputs, width), nn.ReLU()))
            inputs = width
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) samples to (B, classes) logits."""
        x = torch.flatten(x, 1)
        for name in self.stage_names:
            x = getattr(self, name)(x)
        return self.fc(x)
