"""The networks of the paper's CIFAR-10 table: convolutions with ReLU and batch norm, pooled now and then, and dense
layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn


class ForwardNet(nn.Sequential):
    """A network for 32 px images.

    Args:
        channels: of each convolution.
        kernel: side of its kernel.
        pool: indices of convolutions that 2x2 max pooling follows.
        dense: widths of the dense layers.
        dropout: layer (convolutions, then dense ones) -> rate; the paper's distilled students have none.
    """

    def __init__(
        self,
        channels: Sequence[int],
        kernel: int,
        pool: Sequence[int],
        dense: Sequence[int],
        dropout: Mapping[int, float] | None = None,
        num_classes: int = 10,
    ) -> None:
        layers: list[nn.Module] = []
        rates = {int(layer): rate for layer, rate in (dropout or {}).items()}
        inputs = 3
        for i, width in enumerate(channels):
            layers += [nn.Conv2d(inputs, width, kernel, padding=kernel // 2), nn.ReLU(), nn.BatchNorm2d(width)]
            if i in pool:
                layers.append(nn.MaxPool2d(2))
            if i in rates:
                layers.append(nn.Dropout2d(rates[i]))
            inputs = width
        layers.append(nn.Flatten())
        inputs *= (32 // 2 ** len(pool)) ** 2
        for i, width in enumerate(dense, len(channels)):
            layers += [nn.Linear(inputs, width), nn.ReLU(), nn.BatchNorm1d(width)]
            if i in rates:
                layers.append(nn.Dropout(rates[i]))
            inputs = width
        super().__init__(*layers, nn.Linear(inputs, num_classes))
