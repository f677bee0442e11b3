"""The prior: a denoiser of the absolute values of functional maps."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Spec
from stillhouse.errors import UserError
from stillhouse.nn.denoisers import (
    MatrixMLP,
    edm_denoised,
    edm_loss,
    edm_sigma,
    iddpm_denoised,
    iddpm_levels,
    vp_loss,
    vp_sigma,
)
from stillhouse.nn.masked_vit import sincos_positions

Noise = Literal["edm", "released"]


class DenoiserSpec(Spec):
    """The denoiser of maps, and its training."""

    form: Literal["mlp", "dit"] = Field("mlp", description="A residual perceptron, or a diffusion transformer (DiT).")
    width: int = Field(384, ge=1)
    depth: int = Field(3, ge=1, description="Blocks.")
    heads: int = Field(6, ge=1, description="Of a DiT.")
    patch: int = Field(5, ge=1, description="Side of a DiT's patches; it divides `size`.")
    noise: Noise = Field(
        "edm", description="edm: the paper's; released: variance-preserving levels and iDDPM preconditioning."
    )
    spread: float = Field(0.25, gt=0, description="Standard deviation of the data, of EDM.")
    steps: int = Field(2500, ge=1)
    batch_size: int = Field(32, ge=1)
    lr: float = Field(1e-3, gt=0, description="Of Adam (betas 0.9 and 0.99).")
    warmup: int = Field(6400, ge=0, description="Samples over which the rate rises.")
    half_life: int = Field(4500, ge=1, description="Of the weights' average, in samples.")
    ramp: float = Field(0.05, gt=0, description="The half life is at most this share of the samples so far.")

    def build(self, size: int) -> Denoiser:
        """A new one for maps (size, size), initialised by torch's generator."""
        if self.form == "dit" and size % self.patch:
            raise UserError(f"denoiser.patch {self.patch} does not divide the maps' size of {size}.")
        if self.form == "dit" and (self.width % 4 or self.width % self.heads):
            raise UserError(f"denoiser.width {self.width} must be a multiple of 4 and of denoiser.heads {self.heads}.")
        raw: nn.Module
        if self.form == "mlp":
            raw = MatrixMLP(size, self.width, self.depth)
        else:
            levels = 1000.0 if self.noise == "edm" else 1.0
            raw = MatrixTransformer(size, self.patch, self.width, self.depth, self.heads, levels)
        return Denoiser(raw, self.noise, self.spread)


class Denoiser(nn.Module):
    """D(x, s): matrices (B, 1, k, k) and levels (B,) -> (B, 1, k, k).

    Args:
        raw: gives F(z, c) by `raw.raw(z, c)`.
    """

    levels: Tensor

    def __init__(self, raw: nn.Module, noise: Noise, spread: float) -> None:
        super().__init__()
        self.network, self.noise, self.spread = raw, noise, spread
        self.register_buffer("levels", iddpm_levels(), persistent=False)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        raw = self.network.raw
        assert callable(raw)
        if self.noise == "edm":
            return edm_denoised(raw, x, sigma, self.spread)
        return iddpm_denoised(raw, x, sigma, self.levels)

    def loss(self, x: Tensor) -> Tensor:
        """The training loss of samples (B, 1, k, k), with levels and noise from torch's generator."""
        n, edm = len(x), self.noise == "edm"
        sigma = edm_sigma(torch.randn(n, device=x.device)) if edm else vp_sigma(torch.rand(n, device=x.device))
        denoised = self(x + sigma[:, None, None, None] * torch.randn_like(x), sigma)
        return edm_loss(denoised, x, sigma, self.spread) if edm else vp_loss(denoised, x, sigma)


class _Block(nn.Module):
    """A transformer block whose norms are scaled, shifted and gated by the level; the gates begin at 0."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(level)[:, None].chunk(6, -1)
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + gate1 * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2
        out: Tensor = x + gate2 * self.mlp(h)
        return out


class MatrixTransformer(nn.Module):
    """A DiT (Peebles and Xie, arXiv 2212.09748) on patches of matrices, with adaLN-zero and fixed positions.

    Args:
        levels: what levels are multiplied by before their embedding, whose periods suit numbers up to 1,000.
    """

    positions: Tensor

    def __init__(self, size: int, patch: int, width: int, depth: int, heads: int, levels: float = 1.0) -> None:
        super().__init__()
        self.size, self.patch, self.levels = size, patch, levels
        side = size // patch
        self.enter = nn.Linear(patch * patch, width)
        self.register_buffer("positions", sincos_positions(width, (side, side), prefix=0), persistent=False)
        self.embed = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.last = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, patch * patch)
        for layer in (self.last, self.leave):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def raw(self, z: Tensor, level: Tensor) -> Tensor:
        """F(z, c): (B, 1, k, k) and (B,) -> (B, 1, k, k)."""
        n, p, side = len(z), self.patch, self.size // self.patch
        tokens = z.view(n, side, p, side, p).transpose(2, 3).reshape(n, side * side, p * p)
        rates = torch.exp(torch.arange(128, device=z.device) * (-math.log(10000) / 128))
        angles = self.levels * level[:, None] * rates
        embedded = self.embed(torch.cat([angles.cos(), angles.sin()], 1))
        x = self.enter(tokens) + self.positions
        for block in self.blocks:
            x = block(x, embedded)
        shift, scale = self.last(embedded)[:, None].chunk(2, -1)
        out: Tensor = self.leave(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        return out.view(n, side, side, p, p).transpose(2, 3).reshape(n, 1, self.size, self.size)


def average_decay(spec: DenoiserSpec, step: int) -> float:
    """What the weights' average keeps at a step: half after the half life, which is at most a share of the samples so
    far."""
    seen = (step + 1) * spec.batch_size
    return float(0.5 ** (spec.batch_size / max(min(spec.half_life, seen * spec.ramp), 1e-8)))


@torch.no_grad()
def denoising_ratio(denoiser: Denoiser, maps: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """() the root mean square error of denoised maps (N, k, k) over that of the noisy ones, which is sigma's."""
    levels = torch.full((len(maps),), sigma, device=maps.device)
    denoised = denoiser((maps + sigma * noise)[:, None], levels)[:, 0]
    return (denoised - maps).square().mean().sqrt() / (sigma * noise).square().mean().sqrt()
