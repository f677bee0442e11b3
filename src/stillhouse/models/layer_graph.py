"""`LayerGraph`: a network of convolution, batch norm and activation whose layers and links are written down, so that
channels can be traced, and taken out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError, unknown

IMAGE = -1
"""The source that is the image."""
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky": lambda: nn.LeakyReLU(0.1),
    "mish": nn.Mish,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
}


@dataclass(frozen=True)
class Layer:
    """A layer and what it reads.

    Attributes:
        kind: conv (with batch norm and activation), add (a shortcut), concat (a route; of one
            source: that map again), upsample (twice as large),
            pool (maximum, stride 1), or out (a 1x1 convolution with bias: an output of the network).
        sources: positions of the layers it reads; -1 is the image.
        channels: that it gives; of add, upsample and pool, those of its first source.
        kernel, stride: of conv and pool.
        group: the part of the network that it belongs to.
        activation: of conv; "": the network's.
    """

    kind: Literal["conv", "add", "concat", "upsample", "pool", "out"]
    sources: tuple[int, ...]
    channels: int = 0
    kernel: int = 1
    stride: int = 1
    group: str = ""
    activation: str = ""


class ConvBlock(nn.Module):
    """`conv`, `norm`, `act`."""

    def __init__(self, inputs: int, layer: Layer, activation: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, layer.channels, layer.kernel, layer.stride, layer.kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(layer.channels)
        self.act = ACTIVATIONS[layer.activation or activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class LayerGraph(nn.Module):
    """Runs layers in order; each is a submodule, `layers.N`, with its own output (so that taps can name it).

    Args:
        plan: the layers, each after those that it reads.
        channels: of the image.
        activation: leaky, mish, silu or relu.

    Raises:
        UserError: a source that comes later, or a shortcut between unequal channels.
    """

    def __init__(self, plan: Sequence[Layer], channels: int = 3, activation: str = "leaky") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise unknown("options.activation", activation, ACTIVATIONS)
        self.plan = with_channels(plan, channels)
        self.channels = channels
        self.layers = nn.ModuleList(self._made(layer, activation) for layer in self.plan)

    def width(self, source: int) -> int:
        """Channels of a layer, or of the image."""
        return self.channels if source == IMAGE else self.plan[source].channels

    def _made(self, layer: Layer, activation: str) -> nn.Module:
        inputs = self.width(layer.sources[0])
        if layer.kind == "conv":
            return ConvBlock(inputs, layer, activation)
        if layer.kind == "out":
            return nn.Conv2d(inputs, layer.channels, 1)
        if layer.kind == "pool":
            return nn.MaxPool2d(layer.kernel, 1, layer.kernel // 2)
        return Add() if layer.kind == "add" else Concat() if layer.kind == "concat" else Upsample()

    def forward(self, images: Tensor) -> list[Tensor]:
        """The outputs of the `out` layers, in order, of images (B, C, H, W)."""
        return self.values(images)[0]

    def values(self, images: Tensor, wanted: Collection[int] = ()) -> tuple[list[Tensor], dict[int, Tensor]]:
        """The outputs of the `out` layers, and those of the layers wanted, by their numbers."""
        last = {s: i for i, layer in enumerate(self.plan) for s in layer.sources}
        values: dict[int, Tensor] = {IMAGE: images}
        out, found = [], {}
        for i, (layer, module) in enumerate(zip(self.plan, self.layers)):
            value = module(*[values[s] for s in layer.sources])
            if layer.kind == "out":
                out.append(value)
            else:
                values[i] = value
            if i in wanted:
                found[i] = value
            for s in layer.sources:
                if last[s] == i:
                    values.pop(s, None)  # nothing reads it any more
        return out, found


class Add(nn.Module):
    """The sum of maps."""

    def forward(self, *maps: Tensor) -> Tensor:
        return torch.stack(maps).sum(0) if len(maps) > 2 else maps[0] + maps[1]


class Concat(nn.Module):
    """Maps one after the other, along the channels."""

    def forward(self, *maps: Tensor) -> Tensor:
        return torch.cat(maps, 1)


class Upsample(nn.Module):
    """A map of twice the size; each value four times."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


def with_channels(plan: Sequence[Layer], channels: int) -> list[Layer]:
    """The layers with the channels of those that have none of their own. Raises `UserError` for links that cannot
    be."""
    done: list[Layer] = []
    for i, layer in enumerate(plan):
        if not layer.sources or any(not IMAGE <= s < i for s in layer.sources):
            raise UserError(f"Layer {i} ({layer.kind}) reads {layer.sources}, but it can read only layers before it.")
        given = [channels if s == IMAGE else done[s].channels for s in layer.sources]
        if layer.kind == "add" and len(set(given)) > 1:
            raise UserError(f"Layer {i} adds maps of {' and '.join(map(str, given))} channels; they must be equal.")
        own = {"concat": sum(given), "conv": layer.channels, "out": layer.channels}.get(layer.kind, given[0])
        done.append(replace(layer, channels=own))
    return done


def with_widths(plan: Sequence[Layer], widths: Sequence[int], owner: str) -> list[Layer]:
    """The layers with other channels of their `conv`s, in order. Raises `UserError` for another number of them."""
    convs = [i for i, layer in enumerate(plan) if layer.kind == "conv"]
    if len(widths) != len(convs) or any(w < 1 for w in widths):
        raise UserError(
            f"options.widths: {owner} has {len(convs)} layers with batch norm, so give {len(convs)} numbers of at "
            f"least 1; given: {len(widths)}."
        )
    out = list(plan)
    for i, width in zip(convs, widths):
        out[i] = replace(out[i], channels=int(width))
    return out
