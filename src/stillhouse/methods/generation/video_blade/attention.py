"""Adaptive block-sparse attention: which blocks of keys a block of queries attends to is computed from the queries and
keys themselves; means over windows stand for all the rest (arXiv 2508.10774, section 3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.methods.generation.video_blade.order import hilbert_order
from stillhouse.randomness import generator

AT_ONCE = 1 << 24  # scores that are computed at once, about


@dataclass(frozen=True)
class Sparsity:
    """How attention is thinned out.

    Attributes:
        block: tokens of a block.
        sampled: tokens of each block by which blocks are compared.
        least, most: the shares of blocks that a block of queries attends to, at least and at most.
        energy: it takes the blocks that hold this share of its estimated attention.
        inclusive: take the block that reaches that share too, as the paper describes it; False: one less, as the
            released code has it.
        window: tokens whose mean keys and values stand for them in the global branch; 0: no such branch.
        kept_at_end: blocks at the end, of text, that attend to all and are attended to by all.
    """

    block: int = 128
    sampled: int = 32
    least: float = 0.05
    most: float = 0.17
    energy: float = 0.95
    inclusive: bool = False
    window: int = 30
    kept_at_end: int = 0

    def bounds(self, blocks: int) -> tuple[int, int]:
        """How many of so many blocks a row keeps, at least and at most."""
        low, high = (max(1, int(blocks * share)) for share in (self.least, self.most))
        return low, max(low, high)


class Attended(NamedTuple):
    """What queries take from keys: `out` (B, H, L, D), and `lse` (B, H, L, 1), the logarithm of the sum of exponentials
    of their scores, float32."""

    out: Tensor
    lse: Tensor


def padded(x: Tensor, multiple: int) -> Tensor:
    """(B, H, L, D) with the last token repeated up to a multiple of `multiple` tokens."""
    missing = -x.shape[2] % multiple
    return x if not missing else torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1)], 2)


def sampled_positions(uniform: Tensor, count: int) -> Tensor:
    """The positions in a block of the `count` largest of uniform numbers (B, H, 1, block): (B, H, count)."""
    return uniform.topk(count, -1).indices.flatten(2)


@torch.no_grad()
def block_scores(q: Tensor, k: Tensor, of_queries: Tensor, of_keys: Tensor, block: int) -> Tensor:
    """How much each block of queries attends to each block of keys, estimated on sampled tokens.

    For a sampled query: the largest score in a block of keys, exp of what it lacks to its largest of all; the largest
    of these over a block's queries; rows normalised.

    Args:
        q, k: (B, H, L, D).
        of_queries, of_keys: (B, H, m) positions in a block, the same for every block.
        block: tokens of a block.

    Returns:
        (B, H, n, n), n blocks.
    """

    def chosen(x: Tensor, positions: Tensor) -> Tensor:
        blocks = padded(x, block).unflatten(2, (-1, block))
        at = positions[:, :, None, :, None].expand(-1, -1, blocks.shape[2], -1, blocks.shape[4])
        return blocks.gather(3, at)

    qs, ks = chosen(q, of_queries), chosen(k, of_keys).flatten(2, 3)
    n, m = qs.shape[2], qs.shape[3]
    rows = max(1, AT_ONCE // (qs.shape[0] * qs.shape[1] * m * ks.shape[2]))
    found = []
    for some in qs.split(rows, 2):
        scores = some.flatten(2, 3) @ ks.transpose(-1, -2) / math.sqrt(q.shape[-1])
        highest = scores.unflatten(-1, (n, -1)).amax(-1)
        share = (highest - highest.amax(-1, keepdim=True)).exp()
        found.append(share.unflatten(2, (-1, m)).amax(3))
    p = torch.cat(found, 2)
    return p / p.sum(-1, keepdim=True)


def kept_counts(scores: Tensor, sparsity: Sparsity) -> Tensor:
    """How many blocks each row of scores (B, H, n, n) keeps: (B, H, n)."""
    n = scores.shape[-1]
    total = scores.sort(-1, descending=True).values.cumsum(-1)
    short = (total < sparsity.energy * total[..., -1:]).sum(-1)
    count = short + 1 if sparsity.inclusive else short
    return count.clamp(*sparsity.bounds(n))


def block_mask(scores: Tensor, sparsity: Sparsity) -> Tensor:
    """(B, H, n, n) bool: the blocks of keys that blocks of queries attend to, those of the largest scores."""
    rank = scores.argsort(-1, descending=True).argsort(-1)
    mask = rank < kept_counts(scores, sparsity)[..., None]
    if sparsity.kept_at_end:
        mask[..., -sparsity.kept_at_end :] = True
        mask[..., -sparsity.kept_at_end :, :] = True
    return mask


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block: int) -> Attended:
    """Attention to the kept blocks alone, by all scores with those of other blocks left out."""
    tokens = mask.repeat_interleave(block, -1).repeat_interleave(block, -2)[..., : q.shape[2], : k.shape[2]]
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
    return _attended(scores.masked_fill(~tokens, -math.inf), v)


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block: int, most: int | None = None) -> Attended:
    """The same by computing no other scores: of each block of queries, `most` blocks of keys and values are gathered,
    the kept ones first; None: as many as the fullest row has, which is read from the device."""
    length, n = q.shape[2], mask.shape[-1]
    most = int(mask.sum(-1).max()) if most is None else most
    order = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]  # the kept ones first
    kept = mask.gather(-1, order)
    qb, kb, vb = (padded(x, block).unflatten(2, (-1, block)) for x in (q, k, v))
    inside = torch.arange(n * block, device=q.device).view(n, block) < length
    rows = max(1, AT_ONCE // (q.shape[0] * q.shape[1] * most * block * max(block, q.shape[-1])))
    outs, lses = [], []
    for start in range(0, n, rows):
        at, there = order[:, :, start : start + rows], kept[:, :, start : start + rows]
        flat = at.flatten(2)[..., None, None].expand(-1, -1, -1, block, q.shape[-1])
        keys, values = (x.gather(2, flat).unflatten(2, at.shape[2:]).flatten(3, 4) for x in (kb, vb))
        scores = (qb[:, :, start : start + rows] @ keys.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
        seen = (there[..., None] & inside[at]).flatten(3)
        found = _attended(scores.masked_fill(~seen[:, :, :, None], -math.inf), values)
        outs.append(found.out)
        lses.append(found.lse)
    return Attended(*(torch.cat(parts, 2).flatten(2, 3)[:, :, :length] for parts in (outs, lses)))


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Attended:
    """Attention to the means of keys and values over windows of consecutive tokens."""
    means = [padded(x, window).unflatten(2, (-1, window)).mean(3) for x in (k, v)]
    return _attended((q @ means[0].transpose(-1, -2)).float() / math.sqrt(q.shape[-1]), means[1])


def _attended(scores: Tensor, v: Tensor) -> Attended:
    lse = scores.logsumexp(-1, keepdim=True)
    return Attended((scores - lse).exp().to(v.dtype) @ v, lse)


def merged(first: Attended, means: Attended, window: int) -> Tensor:
    """Both branches by the weight of what they attend to, where a mean counts as often as there are tokens in it:
    (B, H, L, D)."""
    share = torch.sigmoid(first.lse - means.lse - math.log(window))
    return (share * first.out.float() + (1 - share) * means.out.float()).to(first.out.dtype)


def adaptive_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sparsity: Sparsity, gather: bool = False
) -> Tensor:
    """Block-sparse attention with its global branch; queries, keys and values (B, H, L, D) in the order of blocks."""
    if gather:
        most = None if sparsity.kept_at_end else sparsity.bounds(mask.shape[-1])[1]
        kept = gathered_attention(q, k, v, mask, sparsity.block, most)
    else:
        kept = masked_attention(q, k, v, mask, sparsity.block)
    if not sparsity.window:
        return kept.out
    return merged(kept, window_attention(q, k, v, sparsity.window), sparsity.window)


class AdaptiveAttention(nn.Module):
    """What a diffusion transformer's attentions do with queries, keys and values in place of dense attention.

    In training the sampled tokens are drawn newly at every call, from torch's generator; in evaluation they are always
    the same ones, so that the same noise gives the same sample.

    Args:
        sparsity: how attention is thinned out.
        grid: tokens of a clip, (frames, height, width).
        order: `hilbert`, or `raster`: row by row, frame by frame, as the tokens come.
        gather: compute the kept scores alone (see `gathered_attention`); False: all, of which others are left out.

    Raises:
        UserError: settings that do not go together, or fewer tokens than two blocks.
    """

    def __init__(
        self,
        sparsity: Sparsity,
        grid: tuple[int, int, int],
        order: Literal["hilbert", "raster"] = "hilbert",
        gather: bool = False,
    ) -> None:
        super().__init__()
        s, length = sparsity, math.prod(grid)
        if not 1 <= s.sampled <= s.block:
            raise UserError(f"sparsity.sampled: 1 to {s.block} tokens of a block; given: {s.sampled}.")
        if not 0 < s.least <= s.most <= 1 or not 0 < s.energy <= 1:
            raise UserError(f"sparsity: 0 < least <= most <= 1 and 0 < energy <= 1; given: {s}.")
        if length < 2 * s.block:
            raise UserError(
                f"sparsity.block: a clip of {length} tokens has not two blocks of {s.block}; make the block smaller."
            )
        if s.window < 0 or s.window > length:
            raise UserError(f"sparsity.window: 0 (no global branch) to {length} tokens; given: {s.window}.")
        self.sparsity, self.grid, self.gather = sparsity, grid, gather
        frames, height, width = grid
        forward, back = hilbert_order(width, height, frames) if order == "hilbert" else (torch.arange(length),) * 2
        self.register_buffer("forward_order", forward, persistent=False)
        self.register_buffer("back_order", back, persistent=False)
        self.kept: Tensor | None = None  # the share of blocks that the last call attended to

    def positions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, m) sampled positions in a block, of queries and of keys."""
        shape = (2, *x.shape[:2], 1, self.sparsity.block)
        if self.training:
            uniform = torch.rand(shape, device=x.device)
        else:
            uniform = torch.rand((2, 1, shape[2], 1, shape[4]), generator=generator("block scores")).to(x.device)
            uniform = uniform.expand(shape)
        first, second = (sampled_positions(u, self.sparsity.sampled) for u in uniform)
        return first, second

    def mask(self, q: Tensor, k: Tensor) -> Tensor:
        """(B, H, n, n) the blocks that are attended to."""
        scores = block_scores(q, k, *self.positions(q), self.sparsity.block)
        return block_mask(scores, self.sparsity)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, heads, L, D), tokens in raster order -> the same of what each takes."""
        q, k, v = (x.index_select(2, self.forward_order) for x in (q, k, v))  # type: ignore[arg-type]
        mask = self.mask(q, k)
        self.kept = mask.float().mean().detach()
        return adaptive_attention(q, k, v, mask, self.sparsity, self.gather).index_select(2, self.back_order)  # type: ignore[arg-type]
