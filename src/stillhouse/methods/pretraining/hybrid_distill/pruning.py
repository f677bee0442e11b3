"""Progressive masking of redundant tokens: which patches a running encoder drops, and where."""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from stillhouse.functional.masking import take_tokens
from stillhouse.functional.precision import full_precision
from stillhouse.nn.masked_vit import embed_patches


@full_precision
def redundancy(tokens: Tensor) -> Tensor:
    """(B, n) mean cosine similarity of each token (B, n, D) to the others; 0 for a single one."""
    unit = tokens / (tokens.norm(dim=-1, keepdim=True) + 1e-6)
    own, total = unit.square().sum(-1), (unit * unit.sum(1, keepdim=True)).sum(-1)
    return (total - own) / max(tokens.shape[1] - 1, 1)


def least_redundant(tokens: Tensor, count: int) -> Tensor:
    """(B, count) rising positions of the tokens that stay; among equal ones, the first."""
    return redundancy(tokens.detach()).argsort(dim=1, stable=True)[:, :count].sort(1).values


def planned_counts(length: int, keep: float, points: int) -> list[int]:
    """Patches left after each of the points, falling by equal ratios to the share `keep`; at least one.

    >>> planned_counts(64, 0.5, 3)
    [51, 40, 32]
    """
    return [max(round(length * keep ** (s / points)), 1) for s in range(1, points + 1)]


class PrunedTokens(NamedTuple):
    """A student's run with fewer and fewer patches.

    Attributes:
        tokens: (B, 1 + n, D) after the final norm, the class token first.
        kept: for each block, the raster positions (B, n) of the patches that it saw.
    """

    tokens: Tensor
    kept: list[Tensor]


def encode_pruned(vit: VisionTransformer, images: Tensor, counts: dict[int, int]) -> PrunedTokens:
    """Run an encoder that drops its most redundant patches before the blocks in `counts`, until so many are left."""
    x = embed_patches(vit, images)
    kept = torch.arange(x.shape[1] - 1, device=x.device).expand(len(x), -1)
    seen = []
    for i, block in enumerate(vit.blocks):
        if counts.get(i, kept.shape[1]) < kept.shape[1]:
            ids = least_redundant(x[:, 1:], counts[i])
            kept = kept.gather(1, ids)
            x = torch.cat([x[:, :1], take_tokens(x[:, 1:], ids)], 1)
        seen.append(kept)
        x = block(x)
    return PrunedTokens(vit.norm(x), seen)
