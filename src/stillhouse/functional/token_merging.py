"""Token merging (ToMe: Bolya et al., ICLR 2023, arXiv 2210.09461): a transformer's most similar tokens become one."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_tokens(
    x: Tensor, metric: Tensor, count: int, size: Tensor | None = None, protected: int = 1
) -> tuple[Tensor, Tensor]:
    """`count` tokens are merged into the most similar ones of the other half (every second token is of one half); a
    token is the mean of all that it was made of.

    Args:
        x: tokens (B, L, C).
        metric: what their cosines are taken of, (B, L, K).
        count: how many are merged; no more than a half of what may be.
        size: (B, L, 1), how many each token was made of; None: one.
        protected: how many of the first tokens (1 or 2) are not merged, and stay the first.

    Returns:
        Tokens (B, L - count, C), and their sizes.
    """
    size = torch.ones_like(x[..., :1]) if size is None else size
    count = min(count, (x.shape[1] - protected) // 2)
    if count <= 0:
        return x, size
    unit = metric / metric.norm(dim=-1, keepdim=True)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    scores[:, 0] = -torch.inf
    if protected > 1:
        scores[:, :, 0] = -torch.inf
    best, partner = scores.max(-1)
    order = best.argsort(-1, descending=True)
    merged, left = order[:, :count], order[:, count:].sort(-1).values
    into = partner.gather(1, merged)

    def joined(values: Tensor) -> Tensor:
        first, second = values[:, ::2], values[:, 1::2]
        wide = (-1, -1, values.shape[-1])
        moved = first.gather(1, merged[..., None].expand(wide))
        stay = first.gather(1, left[..., None].expand(wide))
        second = second.scatter_add(1, into[..., None].expand(wide), moved)
        if protected > 1:
            return torch.cat([stay[:, :1], second[:, :1], stay[:, 1:], second[:, 1:]], 1)
        return torch.cat([stay, second], 1)

    sizes = joined(size)
    return joined(x * size) / sizes, sizes
