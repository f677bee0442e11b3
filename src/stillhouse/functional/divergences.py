"""Divergences between class distributions, and the logits they are computed from. A class that both sides mask out with
minus infinity costs nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stillhouse.functional.counting import counted_mean
from stillhouse.functional.precision import full_precision
from stillhouse.signals import log_softmax


@full_precision
def kl_terms(student_logits: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """p (log p - log q) of each class; their sum over the last axis is KL(p || q). (..., C) and (..., C) -> (...,
    C)."""
    return weighed(teacher_log_probs, teacher_log_probs - log_softmax(student_logits))


@full_precision
def kl_divergence(
    student_logits: Tensor,
    teacher_log_probs: Tensor,
    temperature: float = 1.0,
    counts: Tensor | None = None,
    count: Tensor | float | None = None,
) -> Tensor:
    """KL(teacher || softmax(student_logits / temperature)), summed over the last axis, mean over all others. Detach
    what is a constant.

    Args:
        student_logits: (..., C).
        teacher_log_probs: (..., C), log-probabilities already at that temperature (`teacher.log_probs(temperature)`).
        temperature: divides the student's logits only. No factor T^2 is applied.
        counts: (...,) True where a position counts; default: all. The mean is over the positions that count.
        count: what to divide by instead of their number (see `stillhouse.functional.counting.step_count`).
    """
    terms = kl_terms(student_logits / temperature, teacher_log_probs)
    if counts is None and count is None:
        count = max(math.prod(terms.shape[:-1]), 1)
    return counted_mean(terms, counts, count)


@full_precision
def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum_c targets_c log softmax(logits)_c, mean over all other axes; (..., C) and (..., C). Targets need not sum to
    1."""
    return -(targets * log_softmax(logits).masked_fill(targets == 0, 0.0)).sum(-1).mean()


@full_precision
def standardise(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """(z - mean) / (eps + std) of each row, with the unbiased standard deviation; (..., C) -> (..., C).

    Logit standardisation, Sun et al. (CVPR 2024, arXiv 2403.01427), eq. 6. Log-probabilities give the same as the
    logits they come from. Classes of minus infinity stay so, and mean and deviation are those of the others.
    """
    masked = logits == -math.inf
    classes = (~masked).sum(-1, keepdim=True).to(logits.dtype)
    centred = logits.masked_fill(masked, 0.0)
    centred = (centred - centred.sum(-1, keepdim=True) / classes).masked_fill(masked, 0.0)
    others = max(logits.shape[-1] - 1, 1)
    std = (
        torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
        / math.sqrt(others)
        * (others / (classes - 1).clamp_min(1)).sqrt()
    )
    return (centred / (eps + std)).masked_fill(masked, -math.inf)


def weighed(log_weights: Tensor, values: Tensor) -> Tensor:
    """exp(log_weights) * values, where 0 times anything is 0, and its gradient too."""
    weights = log_weights.exp()
    return weights * values.masked_fill(weights == 0, 0.0)
