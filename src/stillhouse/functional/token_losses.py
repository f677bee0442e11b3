"""Divergences of tokens: one value for each position of (..., V) logits. What counts of them: see
`stillhouse.functional.counting`.

The generalised Jensen-Shannon divergence is that of GKD (Agarwal et al., ICLR 2024, arXiv 2306.13649, eq. 1); the total
variation, skewed and adaptive ones are the baselines of TAID (arXiv 2501.16937). Each takes the student's logits and
the teacher's log-probabilities, which are constants. A class that the teacher or the student masks out with a logit of
minus infinity costs nothing where both do.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.divergences import kl_terms, weighed
from stillhouse.functional.precision import full_precision
from stillhouse.signals import TopK, log_softmax

NEVER = -1e30
"""The log-probability of a class that is not there: probability 0, and a gradient that is a number."""


# ---- divergences -----------------------------------------------------------------------------------------------------


@full_precision
def cross_entropy_rows(student_logits: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """-sum_v p log q: the forward KL and the teacher's entropy, (..., V) and (..., V) -> (...,)."""
    return -_expected(teacher_log_probs, log_softmax(student_logits))


@full_precision
def forward_kl_rows(student_logits: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """KL(p || q) of the teacher's p and the student's q, (..., V) and (..., V) -> (...,)."""
    return kl_terms(student_logits, teacher_log_probs).sum(-1)


@full_precision
def reverse_kl_rows(student_logits: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """KL(q || p), (..., V) and (..., V) -> (...,)."""
    log_q = log_softmax(student_logits)
    return _expected(log_q, log_q - teacher_log_probs)


@full_precision
def jsd_rows(student_logits: Tensor, teacher_log_probs: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, (..., V) and (..., V) -> (...,); eq. 1 of
    the paper of GKD.

    Its limits, divided by beta or 1 - beta, are the forward and reverse KL, and stand for it at beta 0 and 1.

    Raises:
        UserError: beta outside [0, 1].
    """
    check_beta("jsd", beta)
    if beta == 0.0:
        return forward_kl_rows(student_logits, teacher_log_probs)
    if beta == 1.0:
        return reverse_kl_rows(student_logits, teacher_log_probs)
    log_q = log_softmax(student_logits)
    if not teacher_log_probs.requires_grad:
        return _Jsd.apply(log_q, teacher_log_probs, beta)
    log_m = mixture(log_q, teacher_log_probs, beta)
    return beta * _expected(teacher_log_probs, teacher_log_probs - log_m) + (1 - beta) * _expected(log_q, log_q - log_m)


class _Jsd(torch.autograd.Function):
    """The same from log q, with its gradient in one pass: (1 - beta) q log(q / m)."""

    @staticmethod
    def forward(ctx: Any, log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
        q, p = log_q.exp(), log_p.exp()
        log_m = torch.lerp(q, p, beta).clamp_min_(torch.finfo(q.dtype).tiny).log_()
        gap = (log_p - log_m).masked_fill_(p == 0, 0.0)
        teacher = p.mul_(gap).sum(-1)
        torch.sub(log_q, log_m, out=log_m).masked_fill_(q == 0, 0.0)
        student = torch.mul(q, log_m, out=gap).sum(-1)
        ctx.save_for_backward(q, log_m)
        ctx.beta = beta
        return beta * teacher + (1 - beta) * student

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        q, gap = ctx.saved_tensors
        return (q * gap).mul_((grad * (1 - ctx.beta))[..., None]), None, None


@full_precision
def total_variation_rows(student_logits: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """1/2 sum_v |p - q|, (..., V) and (..., V) -> (...,)."""
    return 0.5 * (teacher_log_probs.exp() - F.softmax(student_logits, dim=-1)).abs().sum(-1)


@full_precision
def skew_forward_rows(student_logits: Tensor, teacher_log_probs: Tensor, skew: float = 0.1) -> Tensor:
    """-sum_v p log(skew p + (1 - skew) q): the skewed forward KL of DistiLLM (arXiv 2402.03898) as a cross-entropy,
    (..., V) and (..., V) -> (...,)."""
    return -_expected(teacher_log_probs, mixture(log_softmax(student_logits), teacher_log_probs, skew))


@full_precision
def skew_reverse_rows(student_logits: Tensor, teacher_log_probs: Tensor, skew: float = 0.1) -> Tensor:
    """KL(q || (1 - skew) p + skew q), (..., V) and (..., V) -> (...,)."""
    log_q = log_softmax(student_logits)
    return _expected(log_q, log_q - mixture(log_q, teacher_log_probs, 1 - skew))


@full_precision
def adaptive_kl_rows(student_logits: Tensor, teacher_log_probs: Tensor, head: float = 0.5) -> Tensor:
    """Forward (as a cross-entropy) and reverse KL, weighed by the gap |p - q| in the teacher's head and tail; (..., V)
    and (..., V) -> (...,).

    As TAID's code computes the AKL of arXiv 2404.02657: the teacher's classes are sorted from the least probable, the
    head is where the running sum is at least `head`, and that mask of sorted places is laid on the gaps in their own
    order. Gradient flows through the weights.
    """
    q, p = F.softmax(student_logits, dim=-1), teacher_log_probs.exp()
    in_head = p.sort(dim=-1).values.cumsum(-1) >= head
    gap = (p - q).abs()
    head_gap, tail_gap = (gap * in_head).sum(-1), (gap * ~in_head).sum(-1)
    share = head_gap / (head_gap + tail_gap).clamp_min(torch.finfo(gap.dtype).tiny)
    return share * cross_entropy_rows(student_logits, teacher_log_probs) + (1 - share) * reverse_kl_rows(
        student_logits, teacher_log_probs
    )


@full_precision
def mixture(log_q: Tensor, log_p: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q), elementwise."""
    if share in (0.0, 1.0):
        return log_p if share else log_q
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


# ---- a teacher of which only the top k are known ---------------------------------------------------------------------


@full_precision
def coarse_logits(student_logits: Tensor, indices: Tensor, temperature: float = 1.0) -> Tensor:
    """Logits of k + 1 events: the k classes at `indices`, and all others as one; (..., V) and (..., k) -> (..., k + 1).

    Raises:
        UserError: as many indices as classes, where no other is left.
    """
    check_top("coarse_logits", indices, student_logits.shape[-1])
    logits = student_logits / temperature
    rest = logits.scatter(-1, indices, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, indices), rest], dim=-1)


def coarse_log_probs(top: TopK, classes: int, temperature: float = 1.0) -> Tensor:
    """The teacher's log-probabilities of the same k + 1 events, (..., k + 1), float32, never dense.

    At temperature 1 they are exact. At another, what the tail's mass becomes depends on how it is spread: it is taken
    as even over the other classes.
    """
    others = classes - top.indices.shape[-1]
    tail = top.tail.float().clamp_min(torch.finfo(torch.float32).tiny).log()
    tail = (tail - math.log(others)) / temperature + math.log(others)
    return torch.log_softmax(torch.cat([top.log_probs.float() / temperature, tail[..., None]], dim=-1), dim=-1)


class Coarse(NamedTuple):
    """Student and teacher on the k + 1 events that a teacher's top k tell apart.

    Attributes:
        logits: the student's (..., k + 1).
        log_probs: the teacher's (..., k + 1), a constant.
        known: (...,) where the teacher said anything.
    """

    logits: Tensor
    log_probs: Tensor
    known: Tensor


def coarse(student_logits: Tensor, top: TopK, temperature: float = 1.0) -> Coarse:
    """Both on the same k + 1 events; of a place where fewer than k are known, the others have no probability."""
    known = top.log_probs > -math.inf
    logits = coarse_logits(student_logits, top.indices, temperature).masked_fill(F.pad(~known, (0, 1)), NEVER)
    log_probs = coarse_log_probs(top, student_logits.shape[-1], temperature).detach().clamp_min(NEVER)
    return Coarse(logits, log_probs, known[..., 0])


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_beta(name: str, beta: float) -> None:
    """Raise `UserError` for a beta outside [0, 1]."""
    if not 0 <= beta <= 1:
        raise UserError(f"{name}: beta must be from 0 (forward KL) to 1 (reverse KL); given: {beta}.")


def check_vocabulary(name: str, student_classes: int, teacher_classes: int) -> None:
    """Raise `UserError` where student and teacher score vocabularies of other sizes."""
    if student_classes != teacher_classes:
        raise UserError(
            f"{name}: the student's vocabulary has {student_classes} tokens but the teacher's {teacher_classes}; "
            "both must share one tokenizer (cut padded rows of the output matrix off)."
        )


def check_top(name: str, indices: Tensor, classes: int) -> None:
    """Raise `UserError` where the top k of a teacher leave no other class."""
    if indices.shape[-1] >= classes:
        raise UserError(
            f"{name}: the teacher's top {indices.shape[-1]} are all of the {classes} classes; give its full "
            "log-probabilities instead."
        )


def _expected(log_weights: Tensor, values: Tensor) -> Tensor:
    return weighed(log_weights, values).sum(-1)
