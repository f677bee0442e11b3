"""The losses of ALBEF, and its two draws: which words are masked, and which negatives are hard."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.functional.gather import gather
from stillhouse.functional.precision import full_precision


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-sum(target * log_softmax(logits)) of each row: (…, C), (…, C) -> (…)."""
    return -(target * logits.log_softmax(-1)).sum(-1)


# ---- contrast --------------------------------------------------------------------------------------------------------


class Contrast(NamedTuple):
    """The contrastive loss, and the similarities (B, K) that negatives are drawn by."""

    loss: Tensor
    image_to_text: Tensor
    text_to_image: Tensor


def right_keys(ids: Tensor, key_ids: Tensor) -> Tensor:
    """(B, K): the keys that are right for each query, equal in sum 1: those of its id; ids (B,) and (K,)."""
    same = (ids[:, None] == key_ids[None, :]).float()
    return same / same.sum(1, keepdim=True).clamp_min(1)


@full_precision
def contrast(
    image: Tensor,
    text: Tensor,
    momentum_image: Tensor,
    momentum_text: Tensor,
    image_keys: Tensor,
    text_keys: Tensor,
    right: Tensor,
    temperature: Tensor,
    alpha: float,
) -> Contrast:
    """Contrast with soft targets (eq. 6): alpha * the momentum encoders' softmax + (1 - alpha) * the right keys.

    Args:
        image, text: unit embeddings (B, e).
        momentum_image, momentum_text: of the momentum encoders, (B, e).
        image_keys, text_keys: (K, e): the momentum embeddings of the batch, then of the queue.
        right: (B, K), see `right_keys`.
        temperature: what cosines are divided by, (); the targets give it no gradient.
        alpha: share of the momentum encoders' answers.
    """
    to_text, to_image = image @ text_keys.T / temperature, text @ image_keys.T / temperature
    with torch.no_grad():
        theirs = [
            alpha * (x @ keys.T / temperature).softmax(-1) + (1 - alpha) * right
            for x, keys in ((momentum_image, text_keys), (momentum_text, image_keys))
        ]
    loss = (soft_cross_entropy(to_text, theirs[0]).mean() + soft_cross_entropy(to_image, theirs[1]).mean()) / 2
    return Contrast(loss, to_text, to_image)


# ---- matching --------------------------------------------------------------------------------------------------------


@full_precision
def negative_weights(similarity: Tensor, allowed: Tensor) -> Tensor:
    """(B, B): how likely a candidate is drawn as the negative of a row: its softmax among the batch; 0 where it is not
    allowed, because it is right."""
    return similarity.softmax(-1) * allowed


def drawn(weights: Tensor, allowed: Tensor) -> Tensor:
    """(B,) one candidate of each row by its weight; among those that are allowed, even where all weights have vanished.

    Of a row without any the first, which is no negative (see `matching_loss`).
    """
    tiny = torch.finfo(weights.dtype).tiny
    score = (weights + tiny).log().masked_fill(~allowed, -torch.inf)
    noise = -torch.empty_like(score).exponential_().clamp_min(tiny).log()  # Gumbel: the largest is a draw
    return (score + noise).argmax(1)


@full_precision
def matching_loss(positive: Tensor, negative: Tensor, counts: Tensor | None = None) -> Tensor:
    """Cross-entropy of whether image and text belong together, over all pairs.

    Args:
        positive: scores (B, 2) of pairs.
        negative: scores (N, 2) of what does not belong together.
        counts: (N,) 0 where there was no negative to draw.
    """
    yes = F.cross_entropy(positive, positive.new_ones(len(positive), dtype=torch.int64), reduction="sum")
    no = F.cross_entropy(negative, negative.new_zeros(len(negative), dtype=torch.int64), reduction="none")
    weight = torch.ones_like(no) if counts is None else counts.to(no)
    return (yes + (no * weight).sum()) / (len(positive) + weight.sum())


# ---- masked words ----------------------------------------------------------------------------------------------------


class MaskedWords(NamedTuple):
    """Texts with masked words.

    Attributes:
        ids: (B, L) what is read.
        labels: (B, L) the words that were masked; -100 elsewhere.
    """

    ids: Tensor
    labels: Tensor


def mask_words(ids: Tensor, inside: Tensor, first: int, mask: int, vocabulary: int, share: float = 0.15) -> MaskedWords:
    """Draw words to predict: of them 80 % are replaced by the mask, 10 % by a random token, 10 % stay. At least one in
    a batch.

    Args:
        ids: (B, L); column 0 is the first mark, which stays.
        inside: (B, L) 1 where a token is no padding.
        first: id of the mark that a text begins with.
        mask: id of the mask.
        vocabulary: how many tokens random ones are drawn of.
        share: of the words that are drawn.
    """
    able = inside.bool() & (ids != first)
    score = torch.rand(ids.shape, device=ids.device).masked_fill(~able, 2.0)
    lowest = score.flatten() <= score.min()
    chosen = ((score < share) | lowest.view_as(able)) & able
    kind = torch.rand(ids.shape, device=ids.device)
    replaced = torch.where(kind < 0.8, mask, torch.where(kind < 0.9, torch.randint_like(ids, vocabulary), ids))
    return MaskedWords(torch.where(chosen, replaced, ids), torch.where(chosen, ids, -100))


def masked_places(labels: Tensor, share: float) -> Tensor:
    """(n,) flat positions of labels (B, L), those that are masked first: as many as there may be, so that scores of the
    whole vocabulary are made for few positions and the host need not know how many there are."""
    total = labels.numel()
    most = min(total, int(share * total + 6 * (share * total) ** 0.5) + 8)
    return (labels.flatten() == -100).to(torch.uint8).argsort(stable=True)[:most]


@full_precision
def masked_word_loss(
    logits: Tensor, labels: Tensor, momentum_logits: Tensor | None = None, alpha: float = 0.0
) -> Tensor:
    """(1 - alpha) * cross-entropy + alpha * cross-entropy with the momentum network's softmax, mean over the masked
    words of all processes (eq. 7).

    Args:
        logits, momentum_logits: (…, V).
        labels: (…), -100 for what is not masked.
        alpha: share of the momentum network's answers.
    """
    flat, own = logits.flatten(0, -2), labels.flatten()
    counts = own != -100
    rows = (1 - alpha) * F.cross_entropy(flat, own, reduction="none")
    if momentum_logits is not None and alpha:
        rows = rows + alpha * soft_cross_entropy(flat, momentum_logits.detach().flatten(0, -2).softmax(-1)) * counts
    every = gather(counts.sum()[None])
    return rows.sum() * len(every) / every.sum().clamp_min(1)
