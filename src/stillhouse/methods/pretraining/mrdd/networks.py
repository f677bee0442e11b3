"""The networks of MRDD: residual convolutional encoders and decoders in the manner of VQGAN, or small dense ones, and
the two kinds of code on top."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Spec
from stillhouse.errors import UserError


class NetworkSpec(Spec):
    """One encoder and one decoder."""

    kind: Literal["conv", "dense"] = Field(
        "conv", description="conv: residual levels, halved between; dense: layers over all pixels of a view."
    )
    width: int = Field(16, ge=1, description="conv: channels at full resolution.")
    multipliers: list[int] = Field(
        default_factory=lambda: [1, 2, 4], min_length=1, description="conv: of the width, one a level."
    )
    latent_channels: int = Field(
        8, ge=1, description="conv: channels at the lowest resolution, flattened into the code's linear layer."
    )
    blocks: int = Field(3, ge=1, description="conv: residual blocks a level (the decoder has one more).")
    hidden: list[int] = Field(
        default_factory=lambda: [128], min_length=1, description="dense: widths of the layers, input to code."
    )


def latent_shape(spec: NetworkSpec, shape: Sequence[int]) -> tuple[int, int, int]:
    """(latent_channels, h, w) of views (C, H, W). Raises `UserError` where a side cannot be halved so often."""
    halvings = 2 ** (len(spec.multipliers) - 1)
    if shape[-2] % halvings or shape[-1] % halvings:
        raise UserError(
            f"mrdd: {len(spec.multipliers)} levels halve a view {len(spec.multipliers) - 1} times, which {shape[-2]} x "
            f"{shape[-1]} pixels do not "
            f"allow; set data.image_size to a multiple of {halvings}, or give fewer network.multipliers."
        )
    return spec.latent_channels, shape[-2] // halvings, shape[-1] // halvings


def encoder(spec: NetworkSpec, shape: Sequence[int]) -> tuple[nn.Module, int]:
    """An encoder of views (C, H, W), and the number of features that it gives: (B, C, H, W) -> (B, features)."""
    if spec.kind == "dense":
        widths = [math.prod(shape), *spec.hidden]
        return nn.Sequential(nn.Flatten(), *_dense(widths), nn.ReLU()), widths[-1]
    widths = [spec.width * m for m in spec.multipliers]
    layers: list[nn.Module] = [nn.Conv2d(shape[0], spec.width, 3, padding=1)]
    at = spec.width
    for level, width in enumerate(widths):
        for _ in range(spec.blocks):
            layers.append(Residual(at, width))
            at = width
        if level < len(widths) - 1:
            layers.append(nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(at, at, 3, stride=2)))
    layers += [
        Residual(at, at),
        Residual(at, at),
        _norm(at),
        nn.SiLU(),
        nn.Conv2d(at, spec.latent_channels, 3, padding=1),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers), math.prod(latent_shape(spec, shape))


def decoder(spec: NetworkSpec, code: int, shape: Sequence[int]) -> nn.Module:
    """A decoder of codes: (B, code) -> (B, C, H, W)."""
    if spec.kind == "dense":
        return nn.Sequential(*_dense([code, *reversed(spec.hidden), math.prod(shape)]), nn.Unflatten(1, tuple(shape)))
    latent = latent_shape(spec, shape)
    widths = [spec.width * m for m in reversed(spec.multipliers)]
    at = widths[0]
    layers: list[nn.Module] = [
        nn.Linear(code, math.prod(latent)),
        nn.Unflatten(1, latent),
        nn.Conv2d(latent[0], at, 3, padding=1),
    ]
    layers += [Residual(at, at), Residual(at, at)]
    for level, width in enumerate(widths):
        for _ in range(spec.blocks + 1):
            layers.append(Residual(at, width))
            at = width
        if level < len(widths) - 1:
            layers.append(nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(at, at, 3, padding=1)))
    return nn.Sequential(*layers, _norm(at), nn.SiLU(), nn.Conv2d(at, shape[0], 3, padding=1))


class Residual(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1 x 1 convolution of x where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = _norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class ConsistencyEncoder(nn.Module):
    """One encoder for all views, and a linear layer from all of them, in order, to [mean, log-variance] of c.

    Args:
        views: how many.
        shape: (C, H, W) of each.
        dim: of c.
    """

    center: Tensor
    spread: Tensor

    def __init__(self, spec: NetworkSpec, views: int, shape: Sequence[int], dim: int) -> None:
        super().__init__()
        self.encoder, features = encoder(spec, shape)
        self.head = nn.Linear(views * features, 2 * dim)
        self.register_buffer("center", torch.zeros(dim))
        self.register_buffer("spread", torch.ones(dim))

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """V tensors (B, C, H, W) -> mean and log-variance, each (B, dim)."""
        features = self.encoder(torch.cat(list(views))).chunk(len(views))
        mean, log_variance = self.head(torch.cat(features, -1)).chunk(2, -1)
        return mean, log_variance

    def code(self, views: Sequence[Tensor]) -> Tensor:
        """c: the mean from unmasked views, standardised as the buffers say; (B, dim)."""
        return (self(views)[0] - self.center) / self.spread


class SpecificEncoder(nn.Module):
    """The encoder of one view: (B, C, H, W) -> mean and log-variance of s, each (B, dim)."""

    def __init__(self, spec: NetworkSpec, shape: Sequence[int], dim: int) -> None:
        super().__init__()
        self.encoder, features = encoder(spec, shape)
        self.head = nn.Linear(features, 2 * dim)

    def forward(self, view: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.head(self.encoder(view)).chunk(2, -1)
        return mean, log_variance


def _norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, eps=1e-6)


def _dense(widths: Sequence[int]) -> list[nn.Module]:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layers += [nn.ReLU()] * bool(i) + [nn.Linear(a, b)]
    return layers
