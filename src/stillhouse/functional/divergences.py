"""Divergences between class distributions, and the logits they are computed from."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.functional.precision import full_precision


@full_precision
def kl_divergence(student_logits: Tensor, teacher_log_probs: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """KL(teacher || softmax(student_logits / temperature)), summed over the last axis, mean over all others. Detach what is a constant.

    Args:
        student_logits: (..., C).
        teacher_log_probs: (..., C), log-probabilities already at that temperature (`teacher.log_probs(temperature)`).
        temperature: divides the student's logits only. No factor T^2 is applied.
        mask: (...), True where a row counts; default: all. The mean is over the rows that count.
    """
    log_q = F.log_softmax(student_logits / temperature, dim=-1)
    if mask is None:
        return F.kl_div(log_q, teacher_log_probs, reduction="sum", log_target=True) / math.prod(log_q.shape[:-1])
    rows = F.kl_div(log_q, teacher_log_probs, reduction="none", log_target=True).sum(-1)
    return (rows * mask).sum() / mask.sum().clamp_min(1)


@full_precision
def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum_c targets_c log softmax(logits)_c, mean over all other axes; (..., C) and (..., C). Targets need not sum to 1."""
    return -(targets * F.log_softmax(logits, dim=-1)).sum(-1).mean()


@full_precision
def standardise(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """(z - mean) / (eps + std) of each row, with the unbiased standard deviation; (..., C) -> (..., C).

    Logit standardisation, Sun et al. (CVPR 2024, arXiv 2403.01427), eq. 6. Log-probabilities give the same as the logits they come from.
    """
    centred = logits - logits.mean(-1, keepdim=True)
    std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(max(logits.shape[-1] - 1, 1))
    return centred / (eps + std)
