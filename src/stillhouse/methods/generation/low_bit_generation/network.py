"""A class-conditional transformer of image tokens: token by token, or a grid of tokens at a time from coarse to fine
(VAR, Tian et al., arXiv 2404.02905); and how it is sampled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Spec
from stillhouse.errors import UserError
from stillhouse.methods.generation.low_bit_generation.tokenizer import ImageTokenizer

Scales = Callable[[Tensor], list[Tensor]]
"""Codes (B, …) -> what is known before each scale (see `ImageTokenizer.inputs_of_scales`)."""


class GeneratorSpec(Spec):
    """The transformer."""

    width: int = Field(64, ge=4, description="D.")
    depth: int = Field(3, ge=1, description="Blocks.")
    heads: int = Field(4, ge=1, description="Attention heads; divide the width.")

    def build(self, tokenizer: ImageTokenizer, classes: int) -> TokenTransformer:
        """A new network, initialised by torch's generator. Raises `UserError` for heads that do not divide the
        width."""
        if self.width % self.heads:
            raise UserError(f"generator.heads: {self.heads} heads do not divide the width {self.width}.")
        return TokenTransformer(tokenizer, classes, self.width, self.depth, self.heads)


class SamplerSpec(Spec):
    """How tokens are drawn: the same for all rows that are compared."""

    top_k: int | None = Field(None, ge=1, description="Draw from the k most probable tokens; default: by top_share.")
    top_share: float = Field(0.22, gt=0, le=1, description="k as a share of the vocabulary (VAR: 900 of 4,096).")
    top_p: float = Field(1.0, gt=0, le=1, description="Then from the fewest that have this mass (VAR: 0.96).")
    temperature: float = Field(1.0, gt=0)
    guidance: float = Field(
        0.0, ge=0, description="t of (1 + t) z(class) - t z(no class); of scales, t grows linearly to it (VAR: 4)."
    )

    def k(self, codes: int) -> int:
        """The number of tokens that are drawn from."""
        return min(self.top_k or max(1, round(self.top_share * codes)), codes)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, scaled, shifted and gated by the class (adaptive layer norm)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.ada = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
        """x (B, L, D), condition (B, D), mask (L, L) bool: True where a row sees a column."""
        b, n, d = x.shape
        gate1, gate2, scale1, scale2, shift1, shift2 = self.ada(F.silu(condition))[:, None].chunk(6, -1)
        q, k, v = self.qkv(self.norm1(x) * (1 + scale1) + shift1).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(b, n, d)
        x = x + (1 + gate1) * self.proj(mixed)
        hidden = F.gelu(self.fc1(self.norm2(x) * (1 + scale2) + shift2), approximate="tanh")
        return x + (1 + gate2) * self.fc2(hidden)


class TokenTransformer(nn.Module):
    """Logits of each token given those before it and the class; class number `classes` stands for none.

    With one scale a token sees the tokens before it. With several, the tokens of a grid see each other and all coarser
    ones, and are predicted at once from what the coarser ones show of the image at their size.

    Args:
        tokenizer: gives the vocabulary and the scales; it is no part of the network.
        classes, width, depth, heads: numbers.
    """

    mask: Tensor
    scale_of: Tensor

    def __init__(self, tokenizer: ImageTokenizer, classes: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.codes, self.classes, self.lengths = len(tokenizer.codebook), classes, tokenizer.lengths
        length = tokenizer.length
        self.several = len(self.lengths) > 1
        self._scales: Scales = tokenizer.inputs_of_scales
        self.class_embedding = nn.Embedding(classes + 1, width)
        self.start = nn.Parameter(torch.empty(1, self.lengths[0] if self.several else 1, width))
        self.positions = nn.Parameter(torch.empty(1, length, width))
        self.words: nn.Module = (
            nn.Linear(tokenizer.channels, width) if self.several else nn.Embedding(self.codes, width)
        )
        self.scale_embedding = nn.Embedding(len(self.lengths), width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, self.codes)
        scale_of = torch.tensor([scale for scale, count in enumerate(self.lengths) for _ in range(count)])
        order = scale_of if self.several else torch.arange(length)
        self.register_buffer("mask", order[:, None] >= order[None], persistent=False)
        self.register_buffer("scale_of", scale_of, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for parameter in (self.start, self.positions):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, codes: Tensor, label: Tensor) -> Tensor:
        """Logits (B, n, V) of the first n tokens, as far as the given ones (B, …) show what comes before: n is one more
        than there are, or ends with the scale after the last whole one; L at most.

        Args:
            codes: (B, m) the first tokens, m from 0 to L.
            label: (B,) classes.
        """
        condition = self.class_embedding(label)
        start = self.start + condition[:, None]
        if self.several:
            parts = [self.words(known) for known in self._scales(codes)]
        else:
            parts = [self.words(codes[:, : sum(self.lengths) - 1])]
        x = torch.cat([start, *parts], 1)
        n = x.shape[1]
        x = x + self.positions[:, :n] + self.scale_embedding(self.scale_of[:n])
        for block in self.blocks:
            x = block(x, condition, self.mask[:n, :n])
        logits: Tensor = self.head(self.norm(x))
        return logits


@torch.no_grad()
def sample(
    network: nn.Module,
    label: Tensor,
    sampler: SamplerSpec,
    generator: torch.Generator,
    lengths: list[int],
    classes: int,
) -> Tensor:
    """Codes (B, L) drawn for classes (B,).

    Args:
        network: a `TokenTransformer`, quantised or not, in evaluation mode.
        generator: on the CPU; one uniform number a token, so that networks that agree draw the same tokens.
        lengths: tokens of each scale.
        classes: the number that stands for no class.
    """
    codes = torch.zeros(len(label), 0, dtype=torch.long, device=label.device)
    steps = lengths if len(lengths) > 1 else [1] * lengths[0]
    for i, count in enumerate(steps):
        logits = network(codes, label)[:, -count:]
        strength = sampler.guidance * (i / max(len(steps) - 1, 1) if len(lengths) > 1 else 1.0)
        if strength:
            other = network(codes, torch.full_like(label, classes))[:, -count:]
            logits = (1 + strength) * logits - strength * other
        uniform = torch.rand(logits.shape[:-1], generator=generator).to(label.device)
        codes = torch.cat([codes, drawn(logits, sampler, uniform)], 1)
    return codes


def drawn(logits: Tensor, sampler: SamplerSpec, uniform: Tensor) -> Tensor:
    """One token (...,) of each row of logits (..., V) by a uniform number (...,): of the k most probable tokens, from
    the most probable on, the one in whose share of the mass the number falls."""
    k = sampler.k(logits.shape[-1])
    top, index = (logits.float() / sampler.temperature).sort(dim=-1, descending=True, stable=True)
    probs = top[..., :k].softmax(-1)
    if sampler.top_p < 1:
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(before >= sampler.top_p, 0.0)
    mass = probs.cumsum(-1)
    place = (mass <= (uniform * mass[..., -1])[..., None]).sum(-1, keepdim=True)
    place = torch.minimum(place, (probs > 0).sum(-1, keepdim=True) - 1)
    return index.gather(-1, place)[..., 0]
