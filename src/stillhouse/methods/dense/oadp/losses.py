"""What the detector learns from the teacher's embeddings of objects, blocks and whole images (sections 3.3 and 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.functional.precision import full_precision


@full_precision
def embedding_loss(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean absolute difference of unit embeddings (..., D) over those that count; 0 where none does.

    Args:
        weights: (...), 1 for what counts; None: all do.
    """
    error = (student - teacher.detach()).abs().mean(-1)
    if weights is None:
        return error.mean() if error.numel() else error.sum()
    return (error * weights).sum() / weights.sum().clamp_min(1)


@full_precision
def relation_loss(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean squared difference of the Gram matrices of unit embeddings (n, D), over all pairs that count."""
    error = (student @ student.T - teacher.detach() @ teacher.detach().T).square()
    if weights is None:
        return error.mean() if error.numel() else error.sum()
    pairs = weights[:, None] * weights[None]
    return (error * pairs).sum() / pairs.sum().clamp_min(1)


@full_precision
def whole_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The sum of the squared differences of unit embeddings (B, D), over batch and dimensions."""
    return (student - teacher.detach()).square().sum()


@full_precision
def asymmetric_loss(
    logits: Tensor,
    targets: Tensor,
    gamma_negative: float = 4.0,
    gamma_positive: float = 0.0,
    clip: float = 0.05,
    eps: float = 1e-8,
    weights: Tensor | None = None,
) -> Tensor:
    """The asymmetric loss of several labels (Ridnik et al., ICCV 2021, arXiv 2009.14119), as a mean over samples and
    classes; a logit of minus infinity is a class that is surely absent.

    Args:
        logits: (..., K).
        targets: (..., K) 0 or 1.
        gamma_negative, gamma_positive: how much what is decided already counts less.
        clip: absent classes below this probability count for nothing.
        weights: (...), 1 for samples that count; None: all do.
    """
    y = targets.to(logits.dtype)
    p = logits.sigmoid()
    q = (1 - p + clip).clamp(max=1)
    log_likelihood = y * p.clamp_min(eps).log() + (1 - y) * q.clamp_min(eps).log()
    with torch.no_grad():
        right = p * y + q * (1 - y)
        focus = (1 - right).pow(gamma_positive * y + gamma_negative * (1 - y))
    loss = -(log_likelihood * focus)
    if weights is None:
        return loss.mean()
    return (loss.mean(-1) * weights).sum() / weights.sum().clamp_min(1)


def present(boxes: Tensor, truth: Tensor, labels: Tensor, real: Tensor, classes: int) -> Tensor:
    """(B, M, classes) whether a true box of the class meets a box.

    Args:
        boxes: (B, M, 4).
        truth, labels, real: (B, G, 4), (B, G) and (B, G) true boxes, padded.
    """
    low = torch.maximum(boxes[:, :, None, :2], truth[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], truth[:, None, :, 2:])
    meets = ((high - low) > 0).all(-1) & real[:, None]
    return (meets.to(boxes.dtype) @ F.one_hot(labels, classes).to(boxes.dtype)) > 0
