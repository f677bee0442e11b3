"""Losses of a big vocabulary from hidden states and the output matrix, some rows at a time: no full tensor of logits is ever made.

The gradients with respect to hidden states, matrix and bias are computed beside the loss, chunk by chunk, in the forward pass, as fused linear losses do
(Hsu et al., Liger Kernel, arXiv 2410.10989, section 3.2). They equal those of the plain loss of functional/token_losses.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stillhouse.errors import UserError
from stillhouse.functional.token_losses import Reduction, check_beta, check_top, check_vocabulary, coarse_log_probs
from stillhouse.signals import TopK

CHUNK = 2**25
"""Numbers that the working memory of a chunk holds: 128 MiB in float32."""


@dataclass(frozen=True, slots=True)
class Head:
    """Logits that are not computed yet: hidden @ weight.T + bias."""

    hidden: Tensor  # (..., D)
    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)

    def logits(self) -> Tensor:
        """All logits at once, (..., V): what the functions here avoid."""
        return torch.nn.functional.linear(self.hidden, self.weight, self.bias)


def linear_cross_entropy(
    student: Head,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    count: Tensor | float | None = None,
    reduction: Reduction = "mean",
    rows: int | None = None,
) -> Tensor:
    """Cross-entropy of softmax(logits / temperature) with token ids, the mean over the tokens that count.

    Args:
        student: hidden (..., D), weight (V, D).
        labels: (...,) ids.
        mask: (...,) True where a token counts, beside labels that are not `ignore_index`.
        count: what to divide by instead of the number of counted tokens (see `token_mean`).
        rows: tokens of a chunk; default: as many as `CHUNK` numbers hold.

    Raises:
        UserError: shapes or types that do not fit, or (on the CPU) an id out of range.
    """
    _check_head("linear_cross_entropy", student)
    if labels.shape != student.hidden.shape[:-1]:
        raise UserError(
            f"linear_cross_entropy: labels must have shape {tuple(student.hidden.shape[:-1])}, one for each hidden state; given: {tuple(labels.shape)}."
        )
    counts = labels != ignore_index if mask is None else (labels != ignore_index) & mask
    targets = labels.masked_fill(~counts, 0).flatten()
    if targets.device.type == "cpu" and targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < len(student.weight):
        raise UserError(
            f"linear_cross_entropy: labels must be from 0 to {len(student.weight) - 1}, or {ignore_index}; given: {int(targets.min())} to {int(targets.max())}."
        )

    def score(space: list[Tensor], part: slice) -> Tensor:
        z, target = space[0], targets[part, None]
        picked, highest = z.gather(1, target), z.amax(1, keepdim=True)
        _softmax(z)
        values = highest - z.amax(1, keepdim=True).log() - picked  # log sum exp z = max z - log max softmax(z)
        z.scatter_add_(1, target, torch.full_like(picked, -1.0))
        return values[:, 0]

    return _in_chunks(student, score, 1, temperature, counts, count, reduction, rows)


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
    """Generalised Jensen-Shannon divergence of teacher and student at a temperature, the mean over the tokens that count; no factor T^2.

    Args:
        student: hidden (..., D), weight (V, D).
        teacher: its hidden states and matrix, of any width; or its logits (..., V); or its top k (..., k), compared as k classes and all others as one
            (see `coarse_log_probs`). A constant.
        beta: 0 is the forward KL(p || q), 1 the reverse KL(q || p), between them beta KL(p || m) + (1 - beta) KL(q || m).
        mask: (...,) True where a token counts; default: all.
        count, rows: as for `linear_cross_entropy`.

    Raises:
        UserError: shapes or types that do not fit, vocabularies of other sizes, or beta outside [0, 1].
    """
    _check_head("linear_divergence", student)
    check_beta("linear_divergence", beta)
    _check_teacher(student, teacher)
    compare, spaces = (_forward_kl, 3) if beta == 0 else (_reverse_kl, 2) if beta == 1 else (_jsd(beta), 4)
    score: Callable[[list[Tensor], slice], Tensor]

    if isinstance(teacher, TopK):
        indices, targets = teacher.indices.flatten(0, -2), coarse_log_probs(teacher, len(student.weight), temperature).detach().flatten(0, -2)

        def score(space: list[Tensor], part: slice) -> Tensor:
            z, chosen, target = space[0], indices[part], targets[part].clone()
            kept = z.gather(1, chosen)
            z.scatter_(1, chosen, -math.inf)
            highest = z.amax(1, keepdim=True)
            _softmax(z)  # how the student spreads its tail
            small = torch.cat([kept, highest - z.amax(1, keepdim=True).log()], dim=1)
            values = compare([_log_softmax(small), target, *(torch.empty_like(small) for _ in range(spaces - 2))])
            z.mul_(small[:, -1:]).scatter_(1, chosen, small[:, :-1])
            return values

        return _in_chunks(student, score, 1, temperature, mask, count, reduction, rows)

    source = teacher.detach().flatten(0, -2) if isinstance(teacher, Tensor) else _detached(_multiplied(teacher))

    def score(space: list[Tensor], part: slice) -> Tensor:
        z, t = space[0], space[1]
        if isinstance(source, Tensor):
            t.copy_(source[part]).div_(temperature)
        else:
            _project(source.hidden[part], source.weight, source.bias, t).div_(temperature)
        _log_softmax(z)
        _log_softmax(t).clamp_(min=-1e30)  # a masked logit of minus infinity: probability 0, and 0 times it is 0
        return compare(space)

    return _in_chunks(student, score, spaces, temperature, mask, count, reduction, rows)


# ---- a chunk: log-probabilities in place of which stand, afterwards, gradients with respect to the student's logits ---------------------------------


def _forward_kl(space: list[Tensor]) -> Tensor:
    """(n,) KL(p || q); log q in space[0] becomes q - p. space[1] holds log p and is spent, as all others are."""
    z, t, u = space
    torch.sub(t, z, out=u)
    values = _dot(t.exp_(), u)
    z.exp_().sub_(t)
    return values


def _reverse_kl(space: list[Tensor]) -> Tensor:
    """(n,) KL(q || p); log q becomes q (log q - log p - KL)."""
    z, t = space
    torch.sub(z, t, out=t)
    values = _dot(z.exp_(), t)
    z.mul_(t.sub_(values[:, None]))
    return values


def _jsd(beta: float) -> Callable[[list[Tensor]], Tensor]:
    """(n,) beta KL(p || m) + (1 - beta) KL(q || m); log q becomes (1 - beta) q (log q - log m - KL(q || m))."""

    def compare(space: list[Tensor]) -> Tensor:
        z, t, m, u = space
        torch.logaddexp(z.add_(math.log1p(-beta)), t.add_(math.log(beta)), out=m)
        torch.sub(t, m, out=u)
        teachers = _dot(t.exp_(), u) - beta * math.log(beta)  # t is now beta p, z will be (1 - beta) q
        torch.sub(z, m, out=t).sub_(math.log1p(-beta))
        students = _dot(z.exp_(), t)
        z.mul_(t.sub_(students[:, None] / (1 - beta)))
        return teachers + students

    return compare


def _softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, dim=-1, out=x)


def _log_softmax(x: Tensor) -> Tensor:
    return torch.log_softmax(x, dim=-1, out=x)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.bmm(x[:, None], y[:, :, None])[:, 0, 0]


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """hidden @ weight.T + bias into `out`, which is float32 whatever they are."""
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    else:
        out.copy_(hidden @ weight.t())
    return out if bias is None else out.add_(bias)


# ---- all chunks ----------------------------------------------------------------------------------------------------------------------------


def _in_chunks(
    student: Head,
    score: Callable[[list[Tensor], slice], Tensor],
    spaces: int,
    temperature: float,
    mask: Tensor | None,
    count: Tensor | float | None,
    reduction: Reduction,
    rows: int | None,
) -> Tensor:
    """sum_n w_n score_n, with w_n 0 where a token does not count, else 1 / count."""
    if not temperature > 0:
        raise UserError(f"temperature must be above 0; given: {temperature}.")
    if mask is not None and mask.shape != student.hidden.shape[:-1]:
        raise UserError(f"The mask must have shape {tuple(student.hidden.shape[:-1])}, one for each hidden state; given: {tuple(mask.shape)}.")
    head = _multiplied(student)
    hidden, weight, bias = head.hidden, head.weight, head.bias
    exact = hidden.dtype if hidden.dtype in (torch.float32, torch.float64) else torch.float32
    counts = torch.ones(len(hidden), dtype=exact, device=hidden.device) if mask is None else mask.flatten().to(exact)
    if reduction == "mean":
        counts = counts / (counts.sum().clamp_min(1) if count is None else count)
    rows = rows or max(16, CHUNK // (spaces * len(weight)))
    with torch.autocast(hidden.device.type, enabled=False):
        return _Chunked.apply(
            hidden, weight, bias, counts, score, spaces, temperature, min(rows, max(len(hidden), 1)), mask is not None, torch.is_grad_enabled()
        )


class _Chunked(torch.autograd.Function):
    """The loss, with its gradients made beside it; they are spent by one backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        counts: Tensor,
        score: Callable[[list[Tensor], slice], Tensor],
        spaces: int,
        temperature: float,
        rows: int,
        masked: bool,
        training: bool,
    ) -> Tensor:
        for_hidden, for_weight, for_bias = (training and needed for needed in ctx.needs_input_grad[:3])
        exact = counts.dtype
        d_hidden = torch.empty_like(hidden) if for_hidden else None
        d_weight = torch.zeros_like(weight, dtype=exact) if for_weight else None
        d_bias = torch.zeros_like(weight[:, 0], dtype=exact) if for_bias else None
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        whole = [torch.empty(rows, len(weight), dtype=exact, device=hidden.device) for _ in range(spaces)]
        for start in range(0, len(hidden), rows):
            part = slice(start, min(start + rows, len(hidden)))
            space = [x[: part.stop - start] for x in whole]
            here, counting = hidden[part], counts[part]
            z = _project(here, weight, bias, space[0])
            if temperature != 1:
                z.div_(temperature)
            values = score(space, part)
            loss += torch.where(counting == 0, 0.0, values * counting).sum()
            if masked:
                z.masked_fill_(counting[:, None] == 0, 0.0)  # 0 times what is not a number is none either
            share = counting[:, None] / temperature
            if d_bias is not None:
                d_bias.addmv_(z.t(), share[:, 0])
            if hidden.dtype == exact:
                if d_weight is not None:
                    d_weight.addmm_(z.t(), here * share)
                if d_hidden is not None:
                    torch.mm(z, weight, out=d_hidden[part]).mul_(share)
            else:
                g = z.mul_(share).to(hidden.dtype)
                if d_weight is not None:
                    d_weight += g.t() @ here
                if d_hidden is not None:
                    torch.mm(g, weight, out=d_hidden[part])
        ctx.gradients = (d_hidden, d_weight, d_bias)
        ctx.types = (weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("A chunked loss keeps its gradients for one backward pass; compute the loss again for a second one.")
        d_hidden, d_weight, d_bias = (None if x is None else x.mul_(grad) for x in ctx.gradients)
        ctx.gradients = None
        weights, biases = ctx.types
        d_weight = None if d_weight is None else d_weight.to(weights)
        d_bias = None if d_bias is None else d_bias.to(biases)
        return d_hidden, d_weight, d_bias, None, None, None, None, None, None, None


def _multiplied(head: Head) -> Head:
    """The head with hidden states (N, D), in the type that a linear layer would multiply in: under autocast the half precision."""
    hidden, weight = head.hidden.flatten(0, -2), head.weight
    if _autocast(hidden):
        half = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(half), weight.to(half)
    return Head(hidden, weight, head.bias)


def _detached(head: Head) -> Head:
    return Head(head.hidden.detach(), head.weight.detach(), None if head.bias is None else head.bias.detach())


def _autocast(x: Tensor) -> bool:
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def _check_head(name: str, head: Head) -> None:
    if head.weight.ndim != 2 or head.hidden.ndim < 2 or head.hidden.shape[-1] != head.weight.shape[1]:
        raise UserError(
            f"{name}: hidden states (..., D) and output matrix (V, D) must have one width D; given: {tuple(head.hidden.shape)} and {tuple(head.weight.shape)}."
        )
    if head.bias is not None and head.bias.shape != head.weight.shape[:1]:
        raise UserError(f"{name}: the bias must have shape ({len(head.weight)},); given: {tuple(head.bias.shape)}.")
    if head.hidden.dtype != head.weight.dtype and not _autocast(head.hidden):
        raise UserError(f"{name}: hidden states are {head.hidden.dtype} but the output matrix {head.weight.dtype}; they must have one type.")


def _check_teacher(student: Head, teacher: Head | Tensor | TopK) -> None:
    name, positions = "linear_divergence", student.hidden.shape[:-1]
    if isinstance(teacher, TopK):
        check_top(name, teacher.indices, len(student.weight))
        given = teacher.indices.shape[:-1]
    elif isinstance(teacher, Tensor):
        check_vocabulary(name, len(student.weight), teacher.shape[-1])
        given = teacher.shape[:-1]
    else:
        _check_head(name, teacher)
        check_vocabulary(name, len(student.weight), len(teacher.weight))
        given = teacher.hidden.shape[:-1]
    if given != positions:
        raise UserError(f"{name}: the student has positions of shape {tuple(positions)} but the teacher {tuple(given)}; they must be equal.")
