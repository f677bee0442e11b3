"""Losses of a big vocabulary from hidden states and the output matrix, some rows at a time: no full tensor of logits is
ever made.

The gradients with respect to hidden states, matrix and bias are computed with the loss, chunk by chunk, in the
forward pass, as fused linear losses do (Hsu et al., Liger Kernel, arXiv 2410.10989, section 3.2). They equal those of
the plain loss of functional/token_losses.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.functional.counting import IGNORED, Reduction
from stillhouse.functional.heads import Head, as_multiplied, check_head, in_chunks, project
from stillhouse.functional.token_losses import NEVER, check_beta, check_top, check_vocabulary, coarse_log_probs
from stillhouse.signals import TopK


def linear_cross_entropy(
    student: Head,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = IGNORED,
    count: Tensor | float | None = None,
    reduction: Reduction = "mean",
    rows: int | None = None,
) -> Tensor:
    """Cross-entropy of softmax(logits / temperature) with token ids, the mean over the tokens that count.

    Args:
        student: hidden (..., D), weight (V, D).
        labels: (...,) ids.
        mask: (...,) True where a token counts, provided that its label is not `ignore_index`.
        count: what to divide by instead of the number of counted tokens (see `counted_mean`).
        rows: tokens of a chunk; default: as many as heads.CHUNK numbers hold.

    Raises:
        UserError: shapes or types that do not fit, or (on the CPU) an id out of range.
    """
    check_head("linear_cross_entropy", student)
    if labels.shape != student.hidden.shape[:-1]:
        raise UserError(
            f"linear_cross_entropy: labels must have shape {tuple(student.hidden.shape[:-1])}, one for each hidden "
            f"state; given: {tuple(labels.shape)}."
        )
    counts = labels != ignore_index if mask is None else (labels != ignore_index) & mask
    targets = labels.masked_fill(~counts, 0).flatten()
    if (
        targets.device.type == "cpu"
        and targets.numel()
        and not 0 <= int(targets.min()) <= int(targets.max()) < len(student.weight)
    ):
        raise UserError(
            f"linear_cross_entropy: labels must be from 0 to {len(student.weight) - 1}, or {ignore_index}; given: "
            f"{int(targets.min())} to {int(targets.max())}."
        )

    def score(space: list[Tensor], part: slice) -> Tensor:
        z, target = space[0], targets[part, None]
        picked, highest = z.gather(1, target), z.amax(1, keepdim=True)
        _softmax(z)
        values = highest - z.amax(1, keepdim=True).log() - picked  # log sum exp z = max z - log max softmax(z)
        z.scatter_add_(1, target, torch.full_like(picked, -1.0))
        return values[:, 0]

    return in_chunks(student, score, 1, temperature, counts, count, reduction, rows)


def linear_divergence(
    student: Head,
    teacher: Head | Tensor | TopK,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    count: Tensor | float | None = None,
    reduction: Reduction = "mean",
    rows: int | None = None,
) -> Tensor:
    """Generalised Jensen-Shannon divergence of teacher and student at a temperature, the mean over the tokens that
    count; no factor T^2.

    Args:
        student: hidden (..., D), weight (V, D).
        teacher: its hidden states and matrix, of any width; or its logits (..., V); or its top k (..., k), compared as
            k classes and all others as one (see `coarse_log_probs`). A constant.
        beta: 0 is the forward KL(p || q), 1 the reverse KL(q || p), between them beta KL(p || m) + (1 - beta) KL(q ||
            m).
        mask: (...,) True where a token counts; default: all.
        count, rows: as for `linear_cross_entropy`.

    Raises:
        UserError: shapes or types that do not fit, vocabularies of other sizes, or beta outside [0, 1].

    >>> student = Head(torch.randn(2, 3, 8), torch.randn(50, 8, requires_grad=True))
    >>> teacher = Head(torch.randn(2, 3, 16), torch.randn(50, 16))
    >>> linear_divergence(student, teacher, beta=0.5).backward()
    >>> student.weight.grad.shape
    torch.Size([50, 8])
    """
    check_head("linear_divergence", student)
    check_beta("linear_divergence", beta)
    _check_teacher(student, teacher)
    compare, spaces = (_forward_kl, 3) if beta == 0 else (_reverse_kl, 2) if beta == 1 else (_jsd(beta), 4)
    if isinstance(teacher, TopK):
        indices, unknown = teacher.indices.flatten(0, -2), (teacher.log_probs == -math.inf).flatten(0, -2)
        targets = coarse_log_probs(teacher, len(student.weight), temperature).detach().clamp_min(NEVER).flatten(0, -2)

        def score_top(space: list[Tensor], part: slice) -> Tensor:
            z, chosen = space[0], indices[part]
            target = targets[part].to(z.dtype, copy=True)
            known = z.gather(1, chosen)
            z.scatter_(1, chosen, -math.inf)
            highest = z.amax(1, keepdim=True)
            _softmax(z)  # how the student spreads its tail
            small = torch.cat(
                [known.masked_fill_(unknown[part], NEVER), highest - z.amax(1, keepdim=True).log()], dim=1
            )
            values = compare([_log_softmax(small), target, *(torch.empty_like(small) for _ in range(spaces - 2))])
            small[:, :-1].masked_fill_(
                unknown[part], 0.0
            )  # at indices that the row names already: added, not written over
            z.mul_(small[:, -1:]).scatter_(1, chosen, 0.0).scatter_add_(1, chosen, small[:, :-1])
            return values

        return in_chunks(student, score_top, 1, temperature, mask, count, reduction, rows)

    teacher_logits = _by_part(teacher)

    def score(space: list[Tensor], part: slice) -> Tensor:
        z, t = space[0], space[1]
        teacher_logits(part, t).div_(temperature)
        _log_softmax(z)
        _log_softmax(t).clamp_(min=NEVER)  # a masked logit of minus infinity: probability 0, and 0 times it is 0
        return compare(space)

    return in_chunks(student, score, spaces, temperature, mask, count, reduction, rows)


def linear_taid(
    student: Head,
    teacher: Head | Tensor,
    t: Tensor | float,
    *,
    value: Literal["ce", "kl"] = "ce",
    mask: Tensor | None = None,
    count: Tensor | float | None = None,
    reduction: Reduction = "mean",
    rows: int | None = None,
) -> Tensor:
    """Cross-entropy with, or KL from, TAID's target softmax((1 - t) student + t teacher logits), which is a constant
    (see objectives/taid.py).

    Args:
        student, teacher, mask, count, rows: as for `linear_divergence`; the teacher's top k do not suffice.
        t: from 0, the student itself, to 1, the teacher; a number or a scalar tensor.
    """
    check_head("linear_taid", student)
    _check_teacher(student, teacher)
    teacher_logits = _by_part(teacher)

    def score(space: list[Tensor], part: slice) -> Tensor:
        z, target, u = space
        teacher_logits(part, target).mul_(t)
        target.add_(torch.mul(z, 1 - t, out=u))
        _log_softmax(z)
        _log_softmax(target).clamp_(min=NEVER)
        if value == "kl":
            return _forward_kl(space)
        values = -torch.mul(target.exp_(), z, out=u).sum(1)
        z.exp_().sub_(target)
        return values

    return in_chunks(student, score, 3, 1.0, mask, count, reduction, rows)


@torch.no_grad()
def linear_scores(student: Head, labels: Tensor, *, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each token, (N,) float32, and whether the most probable token is the label, (N,) bool; to
    judge by, without gradient.

    Args:
        student: hidden (N, D), weight (V, D).
        labels: (N,) ids.
        rows: as for `linear_cross_entropy`.
    """
    check_head("linear_scores", student)
    losses = torch.empty(len(labels), device=labels.device)
    right = torch.empty(len(labels), dtype=torch.bool, device=labels.device)

    def score(space: list[Tensor], part: slice) -> Tensor:
        z, target = space[0], labels[part]
        right[part] = z.argmax(1) == target
        losses[part] = torch.logsumexp(z, 1) - z.gather(1, target[:, None])[:, 0]
        return losses[part]

    in_chunks(student, score, 2, 1.0, None, None, "sum", rows)
    return losses, right


def _by_part(teacher: Head | Tensor) -> Callable[[slice, Tensor], Tensor]:
    """What writes the teacher's logits of some rows into a space."""
    if isinstance(teacher, Tensor):
        every = teacher.detach().flatten(0, -2)
        return lambda part, out: out.copy_(every[part])
    head = as_multiplied(teacher).detach()
    return lambda part, out: project(head.hidden[part], head.weight, head.bias, out)


# ---- a chunk: log-probabilities in place of which stand, afterwards, gradients with respect to the student's logits --


def _forward_kl(space: list[Tensor]) -> Tensor:
    """(n,) KL(p || q); log q in space[0] becomes q - p. space[1] holds log p and is spent, as all others are."""
    z, t, u = space
    torch.sub(t, z, out=u)
    values = u.mul_(t.exp_()).sum(1)  # a sum, not a dot product, whose rounding grows with the vocabulary
    z.exp_().sub_(t)
    return values


def _reverse_kl(space: list[Tensor]) -> Tensor:
    """(n,) KL(q || p); log q becomes q (log q - log p - KL)."""
    z, t = space
    torch.sub(z, t, out=t)
    values = t.mul_(z.exp_()).sum(1)
    torch.sub(t, z.mul_(values[:, None]), out=z)
    return values


def _jsd(beta: float) -> Callable[[list[Tensor]], Tensor]:
    """(n,) beta KL(p || m) + (1 - beta) KL(q || m); log q becomes (1 - beta) q (log q - log m - KL(q || m))."""

    def compare(space: list[Tensor]) -> Tensor:
        z, t, m, u = space
        torch.logaddexp(z.add_(math.log1p(-beta)), t.add_(math.log(beta)), out=m)
        torch.sub(t, m, out=u)
        teachers = u.mul_(t.exp_()).sum(1) - beta * math.log(beta)  # t is now beta p, z will be (1 - beta) q
        torch.sub(z, m, out=t).sub_(math.log1p(-beta))
        students = t.mul_(z.exp_()).sum(1)
        torch.sub(t, z.mul_(students[:, None] / (1 - beta)), out=z)
        return teachers + students

    return compare


def _softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, dim=-1, out=x)


def _log_softmax(x: Tensor) -> Tensor:
    return torch.log_softmax(x, dim=-1, out=x)


def _check_teacher(student: Head, teacher: Head | Tensor | TopK) -> None:
    name, positions = "chunked loss", student.hidden.shape[:-1]
    if isinstance(teacher, TopK):
        check_top(name, teacher.indices, len(student.weight))
        given = teacher.indices.shape[:-1]
    elif isinstance(teacher, Tensor):
        check_vocabulary(name, len(student.weight), teacher.shape[-1])
        given = teacher.shape[:-1]
    else:
        check_head(name, teacher)
        check_vocabulary(name, len(student.weight), len(teacher.weight))
        given = teacher.hidden.shape[:-1]
    if given != positions:
        raise UserError(
            f"{name}: the student has positions of shape {tuple(positions)} but the teacher {tuple(given)}; they must "
            "be equal."
        )
