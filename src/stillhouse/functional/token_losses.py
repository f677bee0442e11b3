"""Divergences of tokens: one value for each position of (..., V) logits, which tokens count, and the mean over those that do.

The generalised Jensen-Shannon divergence is that of GKD (Agarwal et al., ICLR 2024, arXiv 2306.13649, eq. 1); the total variation, skewed and adaptive
ones are the baselines of TAID (arXiv 2501.16937). Each takes the student's logits and the teacher's log-probabilities, which are constants. A class that
the teacher or the student masks out with a logit of minus infinity costs nothing where both do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, TopK

Reduction = Literal["mean", "sum"]
NEVER = -1e30
"""The log-probability of a class that is not there: probability 0, and a gradient that is a number."""


# ---- which tokens count --------------------------------------------------------------------------------------------------------------------


def counted(batch: Batch, shape: torch.Size | tuple[int, ...], ignore_index: int = -100) -> Tensor | None:
    """Which positions of logits (*shape, V) count: `batch["mask"]` (*shape) where given; else, of sequences, labels (*shape) that are not `ignore_index`.

    None: all. Of samples (B, C) all count, as an unlabelled one can still be distilled.

    Raises:
        UserError: a mask of another shape.
    """
    mask: Tensor | None = batch.get("mask")
    if mask is not None:
        if mask.shape != torch.Size(shape):
            raise UserError(
                f"The batch's mask has shape {tuple(mask.shape)}, but the logits score positions of shape {tuple(shape)}; they must be equal."
            )
        return mask.bool()
    label: Tensor | None = batch.get("label")
    if label is None or len(shape) < 2 or label.shape != torch.Size(shape):
        return None
    return label != ignore_index


def token_mean(rows: Tensor, mask: Tensor | None = None, count: Tensor | float | None = None, reduction: Reduction = "mean") -> Tensor:
    """The mean of the rows that count, or with `reduction="sum"` their sum; 0 where none counts.

    Args:
        rows: (...,) one value a token.
        mask: (...,) True where it counts; default: all.
        count: what to divide by instead of the number of counted rows: that of all micro-batches of a step, so that accumulation changes nothing.
    """
    total = rows.sum() if mask is None else rows.masked_fill(~mask, 0.0).sum()
    if reduction == "sum":
        return total
    if count is None:
        count = max(rows.numel(), 1) if mask is None else mask.sum().clamp_min(1)
    return total / count


def step_count(batch: Batch, rows: Tensor, mask: Tensor | None = None, share: bool = True) -> Tensor:
    """What the sum over a batch is divided by so that the mean is over all tokens of the optimiser step.

    `batch["token_count"]`, where a loop that accumulates gives it (see `weigh_tokens_alike`); else the tokens that count here.

    Args:
        rows: (...,) one value a token.
        mask: (...,) True where it counts; default: all.
        share: over several processes, whose gradients are averaged, take the mean of their numbers, so that every token weighs the same wherever it
            lies. Every process must then call this.
    """
    given = batch.get("token_count", rows.numel() if mask is None else mask.sum())
    count = torch.ones(1, device=rows.device) * given
    if share and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count[0].clamp_min(1)


def has_tokens(batch: Batch) -> bool:
    """Whether the batch's labels are of tokens, (B, L) ids."""
    label = batch.get("label")
    return isinstance(label, Tensor) and label.ndim == 2 and not label.is_floating_point()


def weigh_tokens_alike(batches: Sequence[Batch]) -> None:
    """Give the batches of tokens of one optimiser step, whose losses are averaged, the `token_count` with which every token weighs the same; in place."""
    masks = [counted(batch, batch["label"].shape) for batch in batches]
    mean = torch.stack([mask.sum() for mask in masks if mask is not None]).sum() / len(batches)
    for batch in batches:
        batch["token_count"] = mean


# ---- divergences ---------------------------------------------------------------------------------------------------------------------------


@full_precision
def cross_entropy_rows(student_logits: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """-sum_v p log q: the forward KL and the teacher's entropy, (..., V) and (..., V) -> (...,)."""
    return -_expected(teacher_log_probs, F.log_softmax(student_logits, dim=-1))


@full_precision
def forward_kl_rows(student_logits: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """KL(p || q) of the teacher's p and the student's q, (..., V) and (..., V) -> (...,)."""
    return _expected(teacher_log_probs, teacher_log_probs - F.log_softmax(student_logits, dim=-1))


@full_precision
def reverse_kl_rows(student_logits: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """KL(q || p), (..., V) and (..., V) -> (...,)."""
    log_q = F.log_softmax(student_logits, dim=-1)
    return _expected(log_q, log_q - teacher_log_probs)


@full_precision
def jsd_rows(student_logits: Tensor, teacher_log_probs: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, (..., V) and (..., V) -> (...,); eq. 1 of the paper of GKD.

    Its limits, divided by beta or 1 - beta, are the forward and reverse KL, and stand for it at beta 0 and 1.

    Raises:
        UserError: beta outside [0, 1].
    """
    check_beta("jsd", beta)
    if beta == 0.0:
        return forward_kl_rows(student_logits, teacher_log_probs)
    if beta == 1.0:
        return reverse_kl_rows(student_logits, teacher_log_probs)
    log_q = F.log_softmax(student_logits, dim=-1)
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
    """-sum_v p log(skew p + (1 - skew) q): the skewed forward KL of DistiLLM (arXiv 2402.03898) as a cross-entropy, (..., V) and (..., V) -> (...,)."""
    return -_expected(teacher_log_probs, mixture(F.log_softmax(student_logits, dim=-1), teacher_log_probs, skew))


@full_precision
def skew_reverse_rows(student_logits: Tensor, teacher_log_probs: Tensor, skew: float = 0.1) -> Tensor:
    """KL(q || (1 - skew) p + skew q), (..., V) and (..., V) -> (...,)."""
    log_q = F.log_softmax(student_logits, dim=-1)
    return _expected(log_q, log_q - mixture(log_q, teacher_log_probs, 1 - skew))


@full_precision
def adaptive_kl_rows(student_logits: Tensor, teacher_log_probs: Tensor, head: float = 0.5) -> Tensor:
    """Forward (as a cross-entropy) and reverse KL, weighed by the gap |p - q| in the teacher's head and tail; (..., V) and (..., V) -> (...,).

    As TAID's code computes the AKL of arXiv 2404.02657: the teacher's classes are sorted from the least probable, the head is where the running sum is at
    least `head`, and that mask of sorted places is laid on the gaps in their own order. Gradient flows through the weights.
    """
    q, p = F.softmax(student_logits, dim=-1), teacher_log_probs.exp()
    in_head = p.sort(dim=-1).values.cumsum(-1) >= head
    gap = (p - q).abs()
    head_gap, tail_gap = (gap * in_head).sum(-1), (gap * ~in_head).sum(-1)
    share = head_gap / (head_gap + tail_gap).clamp_min(torch.finfo(gap.dtype).tiny)
    return share * cross_entropy_rows(student_logits, teacher_log_probs) + (1 - share) * reverse_kl_rows(student_logits, teacher_log_probs)


@full_precision
def mixture(log_q: Tensor, log_p: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q), elementwise."""
    if share in (0.0, 1.0):
        return log_p if share else log_q
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


# ---- a teacher of which only the top k are known -------------------------------------------------------------------------------------------


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

    At temperature 1 they are exact. At another, what the tail's mass becomes depends on how it is spread: it is taken as even over the other classes.
    """
    others = classes - top.indices.shape[-1]
    tail = top.tail.float().clamp_min(torch.finfo(torch.float32).tiny).log()
    tail = (tail - math.log(others)) / temperature + math.log(others)
    return torch.log_softmax(torch.cat([top.log_probs.float() / temperature, tail[..., None]], dim=-1), dim=-1)


# ---- checks --------------------------------------------------------------------------------------------------------------------------------


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
        raise UserError(f"{name}: the teacher's top {indices.shape[-1]} are all of the {classes} classes; give its full log-probabilities instead.")


def _expected(log_weights: Tensor, values: Tensor) -> Tensor:
    weights = log_weights.exp()
    return (weights * values.masked_fill(weights == 0, 0.0)).sum(-1)  # 0 log 0 is 0, and its gradient too
