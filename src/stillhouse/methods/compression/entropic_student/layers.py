"""The layers of the encoder and decoder: convolutions with generalised divisive normalisation (Ballé et al., arXiv
1511.06281; the simplified form with absolute values of Johnston et al., arXiv 1912.08771)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.functional.precision import full_precision

OFFSET = 2.0**-18
"""e of the parametrisation: stored values are sqrt(value + e^2)."""


class _LowerBound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp_min(bound)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * ((x >= ctx.bound) | (grad < 0)), None


def lower_bound(x: Tensor, bound: float) -> Tensor:
    """max(x, bound). Where x is below the bound, a gradient passes if descent along it would raise x."""
    bounded: Tensor = _LowerBound.apply(x, bound)
    return bounded


@full_precision
def gdn1(x: Tensor, beta: Tensor, gamma: Tensor, inverse: bool = False, beta_min: float = 1e-6) -> Tensor:
    """x_i / (b_i + sum_j g_ij |x_j|), or x_i times that where `inverse`; shape (B, C, H, W).

    Args:
        x: (B, C, H, W).
        beta, gamma: (C,) and (C, C) as they are stored; b = max(beta, sqrt(beta_min + e^2))^2 - e^2, and g likewise
            with a bound of e.
        inverse: the decoder's form.
        beta_min: the least b.
    """
    b = lower_bound(beta, (beta_min + OFFSET**2) ** 0.5).square() - OFFSET**2
    g = lower_bound(gamma, OFFSET).square() - OFFSET**2
    norm = F.conv2d(x.abs(), g[:, :, None, None], b)
    return x * norm if inverse else x / norm


class GDN(nn.Module):
    """`gdn1` with its weights: b starts at 1, g at a tenth of the identity.

    Args:
        channels: C.
        inverse: the decoder's form.
    """

    def __init__(self, channels: int, inverse: bool = False) -> None:
        super().__init__()
        self.inverse = inverse
        self.beta = nn.Parameter((torch.ones(channels) + OFFSET**2).sqrt())
        self.gamma = nn.Parameter((0.1 * torch.eye(channels) + OFFSET**2).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        return gdn1(x, self.beta, self.gamma, self.inverse)


def encoder(inputs: int, channels: int, stride: int = 4) -> nn.Sequential:
    """Images (B, inputs, H, W) to latents (B, channels, ceil(H / stride) - 1, ceil(W / stride) - 1).

    Args:
        inputs: channels of the images.
        channels: C of the latents; the layers before have 4C and 2C.
        stride: 4 as published; 2 or 1 where the features to imitate are larger.
    """
    first, second = {4: (2, 2), 2: (2, 1), 1: (1, 1)}[stride]
    return nn.Sequential(
        nn.Conv2d(inputs, 4 * channels, 5, first, 2, bias=False),
        GDN(4 * channels),
        nn.Conv2d(4 * channels, 2 * channels, 5, second, 2, bias=False),
        GDN(2 * channels),
        nn.Conv2d(2 * channels, channels, 2, bias=False),
    )


def decoder(channels: int, outputs: int) -> nn.Sequential:
    """Latents (B, channels, h, w) to features (B, outputs, h + 1, w + 1)."""
    return nn.Sequential(
        nn.Conv2d(channels, 2 * outputs, 2, padding=1, bias=False),
        GDN(2 * outputs, inverse=True),
        nn.Conv2d(2 * outputs, outputs, 2, bias=False),
        GDN(outputs, inverse=True),
        nn.Conv2d(outputs, outputs, 2, padding=1, bias=False),
    )
