"""What the new head keeps of the old one's outputs on the same regions. Class 0 is the background; the old head has
O + 1 columns, the new one N + 1 of which the first O + 1 are the same classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import unknown
from stillhouse.functional.precision import full_precision

Scores = Literal["l2", "uce", "ce", "ce_ada"]


@full_precision
def score_loss(student: Tensor, teacher: Tensor, form: Scores = "l2") -> Tensor:
    """Distillation of the regions' class scores (R, N + 1) and (R, O + 1); 0 without regions.

    Args:
        form: `l2`, the mean squared difference of scores less their row's mean over all own columns; `uce`, the
            cross-entropy in which the new classes count as background (MMA); `ce`, over the old columns alone, their
            mean; `ce_ada`, their sum.

    Raises:
        UserError: another form.
    """
    if form not in get_args(Scores):
        raise unknown("form of the scores' distillation", form, get_args(Scores))
    teacher, columns = teacher.detach(), teacher.shape[1]
    if not len(teacher):
        return student.sum() * 0.0
    if form == "l2":
        centred = student - student.mean(1, keepdim=True)
        return F.mse_loss(centred[:, :columns], teacher - teacher.mean(1, keepdim=True))
    wanted = teacher.softmax(1)
    if form != "uce":
        products = -wanted * student[:, :columns].log_softmax(1)
        return products.mean() if form == "ce" else products.sum(1).mean()
    whole = student.logsumexp(1, keepdim=True)
    background = torch.cat([student[:, :1], student[:, columns:]], 1).logsumexp(1, keepdim=True)
    found = torch.cat([background, student[:, 1:columns]], 1) - whole
    return -(wanted * found).mean()


@full_precision
def box_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared differences of the old classes' box deltas (R, N + 1, 4) and (R, O + 1, 4), summed over a box, mean over
    regions and classes without the background; 0 without regions."""
    teacher = teacher.detach()
    if not len(teacher):
        return student.sum() * 0.0
    return (student[:, 1 : teacher.shape[1]] - teacher[:, 1:]).square().sum(-1).mean()


@full_precision
def mask_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Binary cross-entropy of the old columns' mask logits (R, N + 1, M, M) with the probabilities of the old head,
    mean over everything; 0 without regions. Masks of one column for all classes are compared as they are."""
    teacher = teacher.detach()
    if not len(teacher):
        return student.sum() * 0.0
    return F.binary_cross_entropy_with_logits(student[:, : teacher.shape[1]], teacher.sigmoid())


@full_precision
def region_loss(
    objectness: Sequence[Tensor],
    deltas: Sequence[Tensor],
    old_objectness: Sequence[Tensor],
    old_deltas: Sequence[Tensor],
    threshold: float = 0.1,
) -> Tensor:
    """Filtered distillation of the first stage: only what the old head finds more surely than the new one.

    Args:
        objectness: by level (B, A, H, W).
        deltas: by level (B, 4 A, H, W), four values in a row for each anchor.
        old_objectness, old_deltas: of the old head.
        threshold: by how much surer the old one must be for its box to count.
    """
    terms = []
    for mine, moved, theirs, wanted in zip(objectness, deltas, old_objectness, old_deltas):
        surer = theirs.detach() - mine
        errors = (moved - wanted.detach()).square().unflatten(1, (-1, 4)).sum(2)
        terms.append(surer.clamp_min(0).square().mean() + (errors * (surer.detach() > threshold)).mean())
    return torch.stack(terms).mean()


@full_precision
def unbiased_cross_entropy(scores: Tensor, labels: Tensor, old: int) -> Tensor:
    """Cross-entropy of scores (R, N + 1) and labels (R,), 0 or a new class, in which what is not labelled may be one of
    the `old` classes: their probability is added to the background's."""
    whole = scores.logsumexp(1, keepdim=True)
    background = scores[:, : old + 1].logsumexp(1, keepdim=True) - whole
    found = torch.cat([background, scores[:, 1:] - whole], 1)
    return F.nll_loss(found, labels) if len(labels) else scores.sum() * 0.0


@full_precision
def feature_loss(student: Tensor, teacher: Tensor, temperature: float = 0.5) -> Tensor:
    """Attentive distillation of a map (B, C, H, W) of the extractors: squared differences under the attention of the
    old one, over positions and over channels, and the differences of both attentions. Not used in the recommended
    method."""
    teacher = teacher.detach()
    spatial, channel = _attention(teacher, temperature)
    own_spatial, own_channel = _attention(student, temperature)
    weighted = ((student - teacher).square() * spatial * channel).mean()
    return weighted + (own_spatial - spatial).abs().mean() + (own_channel - channel).abs().mean()


def _attention(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Over positions (B, 1, H, W) and over channels (B, C, 1, 1), of mean 1."""
    size, height, width = x.shape[1], x.shape[2], x.shape[3]
    strength = x.abs()
    positions = (strength.mean(1).flatten(1) / temperature).softmax(1) * (height * width)
    channels = (strength.mean((2, 3)) / temperature).softmax(1) * size
    return positions.view(-1, 1, height, width), channels.view(-1, size, 1, 1)
