"""Denoisers of matrices: how a network's raw output becomes a denoised sample (EDM, Karras et al. 2022, arXiv
2206.00364; iDDPM as that paper writes it), their training losses, and a small network.

A raw network is `F(z, c)`: samples (B, 1, k, k) scaled by c_in, and the level's number c (B,) -> (B, 1, k, k).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Raw = Callable[[Tensor, Tensor], Tensor]


def edm_denoised(raw: Raw, x: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """D(x, s) = c_skip x + c_out F(c_in x, ln(s) / 4); x (B, ...), sigma (B,)."""
    s = sigma.view(-1, *(1,) * (x.ndim - 1))
    total = s.square() + sigma_data**2
    out = raw(x / total.sqrt(), sigma.log() / 4)
    return sigma_data**2 / total * x + s * sigma_data / total.sqrt() * out


def iddpm_levels(count: int = 1000, least: float = 1e-3, shift: float = 8e-3) -> Tensor:
    """(count + 1,) noise levels of iDDPM's cosine schedule, falling to 0."""
    bar = [math.sin(0.5 * math.pi * j / count / (shift + 1)) ** 2 for j in range(count + 1)]
    levels = [0.0] * (count + 1)
    for j in range(count, 0, -1):
        levels[j - 1] = math.sqrt((levels[j] ** 2 + 1) / max(bar[j - 1] / bar[j], least) - 1)
    return torch.tensor(levels)


def iddpm_denoised(raw: Raw, x: Tensor, sigma: Tensor, levels: Tensor) -> Tensor:
    """D(x, s) = x - s F(x / sqrt(s^2 + 1), c), with c counted down from the nearest of the levels."""
    s = sigma.view(-1, *(1,) * (x.ndim - 1))
    nearest = (sigma[:, None] - levels).abs().argmin(1)
    return x - s * raw(x / (s.square() + 1).sqrt(), (len(levels) - 2 - nearest).to(x.dtype))


def edm_sigma(normal: Tensor, mean: float = -1.2, spread: float = 1.2) -> Tensor:
    """Noise levels of training: ln s ~ N(mean, spread^2)."""
    return (mean + spread * normal).exp()


def vp_sigma(uniform: Tensor, beta_d: float = 19.9, beta_min: float = 0.1, least: float = 1e-5) -> Tensor:
    """Noise levels of training, variance preserving: s = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)."""
    t = 1 + uniform * (least - 1)
    return (0.5 * beta_d * t.square() + beta_min * t).exp().sub(1).sqrt()


def edm_loss(denoised: Tensor, x: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Squared errors weighed by (s^2 + sd^2) / (s sd)^2: summed over entries, mean over samples."""
    weight = (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()
    return (weight * (denoised - x).square().flatten(1).sum(1)).mean()


def vp_loss(denoised: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """Squared errors over s^2: summed over entries, mean over samples."""
    return ((denoised - x).square().flatten(1).sum(1) / sigma.square()).mean()


class MatrixMLP(nn.Module):
    """A residual perceptron on flattened matrices, with the level as a further input.

    Args:
        size: k, the side of the matrices.
        width: of the hidden layers.
        depth: residual blocks.
        sigma_data: the spread of the data, of the preconditioning.
    """

    def __init__(self, size: int, width: int = 384, depth: int = 3, sigma_data: float = 0.25) -> None:
        super().__init__()
        self.size, self.sigma_data = size, sigma_data
        self.enter = nn.Linear(size * size, width)
        self.level = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.leave = nn.Linear(width, size * size)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def raw(self, z: Tensor, level: Tensor) -> Tensor:
        """F(z, c): (B, 1, k, k) and (B,) -> (B, 1, k, k)."""
        angles = level[:, None] * torch.exp(torch.linspace(0, 4, 8, device=z.device))
        h = self.enter(z.flatten(1)) + self.level(torch.cat([angles.sin(), angles.cos()], 1))
        for block in self.blocks:
            h = h + block(h)
        return self.leave(h).view_as(z)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """D(x, s): (B, 1, k, k) and (B,) -> (B, 1, k, k)."""
        return edm_denoised(self.raw, x, sigma, self.sigma_data)
