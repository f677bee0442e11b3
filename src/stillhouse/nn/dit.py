"""Blocks of diffusion transformers (Peebles and Xie, arXiv 2212.09748): self-attention whose mixing can be replaced,
and layer norms that a condition shifts, scales and gates."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError


def step_embedding(t: Tensor, width: int, longest: float = 10000.0) -> Tensor:
    """Steps (B,) as cosines, then sines, of `width` / 2 falling frequencies: (B, width)."""
    half = width // 2
    rates = torch.exp(-math.log(longest) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], 1)


def grid_positions(grid: tuple[int, ...], width: int) -> Tensor:
    """Fixed sine-cosine positions of a grid's tokens, the last axis the fastest: (tokens, width); the width is shared
    out among the axes of more than one token."""
    axes = [i for i, n in enumerate(grid) if n > 1] or [len(grid) - 1]
    share = width // len(axes) // 2 * 2
    places = torch.stack(torch.meshgrid(*[torch.arange(n) for n in grid], indexing="ij"), -1).flatten(0, -2)
    parts = [step_embedding(places[:, axis], share) for axis in axes]
    return F.pad(torch.cat(parts, 1), (0, width - share * len(axes)))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token with every other: (B, heads, L, D)."""
    return F.scaled_dot_product_attention(q, k, v)


class DenseAttention(nn.Module):
    """Every token takes from every other."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries, keys and values (B, heads, L, D) -> (B, heads, L, D)."""
        return attend(q, k, v)


class SelfAttention(nn.Module):
    """Self-attention with normalised queries and keys.

    Attributes:
        mix: what is done with queries, keys and values (B, heads, L, D); set it to replace dense attention.
    """

    mix: nn.Module

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"The number of heads must divide the width; given: {heads} heads, width {width}.")
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.q_norm, self.k_norm = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))
        self.mix = DenseAttention()

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width) -> (B, L, width)."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed: Tensor = self.mix(self.q_norm(q), self.k_norm(k), v)
        return self.out(mixed.transpose(1, 2).flatten(2))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, L, width), scaled and shifted by (B, width)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Attention and a perceptron; a condition (B, width) gives shift, scale and gate of each. It begins as the identity
    (adaLN-Zero).

    Args:
        width, heads: of the tokens and the attention.
        ratio: width of the perceptron over that of the tokens.
    """

    def __init__(self, width: int, heads: int, ratio: float = 4.0) -> None:
        super().__init__()
        inner = int(width * ratio)
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attention = SelfAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, L, width) and (B, width) -> (B, L, width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(6, -1)
        x = x + gate1[:, None] * self.attention(modulated(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulated(self.norm2(x), shift2, scale2))
