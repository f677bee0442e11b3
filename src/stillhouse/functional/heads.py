"""`Head`, logits that are not computed yet, and the loop over chunks of their rows that makes a loss and its gradients
without a full tensor of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.counting import Reduction
from stillhouse.signals import Signals

BIG_VOCABULARY = 32_000
"""Tokens from which on logits are not computed all at once, where that is left open."""
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
        return F.linear(self.hidden, self.weight, self.bias)

    def detach(self) -> Head:
        """The same outside autograd (no copy)."""
        return Head(self.hidden.detach(), self.weight.detach(), None if self.bias is None else self.bias.detach())


def head_of(signals: Signals, owner: str) -> Head:
    """The head of a network that gives no logits: its parts `hidden` (..., D), `output_weight` (V, D) and, where it has
    one, `output_bias` (V,).

    Raises:
        UserError: a part is missing.
    """
    try:
        return Head(signals.parts["hidden"], signals.parts["output_weight"], signals.parts.get("output_bias"))
    except KeyError as missing:
        raise UserError(
            f"The {owner} gives neither logits nor the part {missing}; chunked losses need `hidden` and "
            "`output_weight`."
        ) from None


def in_chunks(
    student: Head,
    score: Callable[[list[Tensor], slice], Tensor],
    spaces: int,
    temperature: float,
    mask: Tensor | None,
    count: Tensor | float | None,
    reduction: Reduction,
    rows: int | None,
) -> Tensor:
    """The sum of the scores of the tokens that count, over `count`: by default their number, with `reduction="sum"` 1.

    Args:
        score: (spaces of n rows of V, which rows) -> (n,) values. The first space holds logits / temperature and is
            left holding the gradient of each row's value with respect to them; the others are working memory.
        rows: of a chunk; default: as many as `CHUNK` numbers hold.
    """
    if not temperature > 0:
        raise UserError(f"temperature must be above 0; given: {temperature}.")
    if mask is not None and mask.shape != student.hidden.shape[:-1]:
        raise UserError(
            f"The mask must have shape {tuple(student.hidden.shape[:-1])}, one for each hidden state; given: "
            f"{tuple(mask.shape)}."
        )
    head = as_multiplied(student)
    tokens, vocabulary = len(head.hidden), len(head.weight)
    if mask is not None:
        mask = mask.flatten()
    if reduction == "sum":
        count = 1.0
    elif count is None:
        count = max(tokens, 1) if mask is None else mask.sum().clamp_min(1)
    rows = min(rows or max(16, CHUNK // (spaces * vocabulary)), max(tokens, 1))
    with torch.autocast(head.hidden.device.type, enabled=False) if _autocast(head.hidden) else nullcontext():
        loss: Tensor = _Chunked.apply(
            head.hidden, head.weight, head.bias, mask, score, spaces, temperature, rows, torch.is_grad_enabled()
        )
        return loss / count


class _Chunked(torch.autograd.Function):
    """The sum over tokens that count, with its gradients, which one backward pass uses up."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        score: Callable[[list[Tensor], slice], Tensor],
        spaces: int,
        temperature: float,
        rows: int,
        training: bool,
    ) -> Tensor:
        for_hidden, for_weight, for_bias = (training and needed for needed in ctx.needs_input_grad[:3])
        exact = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
        d_hidden = torch.empty_like(hidden, dtype=exact) if for_hidden else None
        d_weight = torch.zeros_like(weight, dtype=exact) if for_weight else None
        d_bias = torch.zeros_like(weight[:, 0], dtype=exact) if for_bias else None
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        whole = [torch.empty(rows, len(weight), dtype=exact, device=hidden.device) for _ in range(spaces)]
        for start in range(0, len(hidden), rows):
            part = slice(start, min(start + rows, len(hidden)))
            space, here = [x[: part.stop - start] for x in whole], hidden[part]
            z = project(here, weight, bias, space[0])
            if temperature != 1:
                z.div_(temperature)
            values = score(space, part)
            if mask is not None:  # filled, not multiplied: what does not count need not be a number
                ignored = ~mask[part]
                values = values.masked_fill(ignored, 0.0)
                z.masked_fill_(ignored[:, None], 0.0)
            loss += values.sum()
            if d_bias is not None:
                d_bias += z.sum(0)
            if hidden.dtype == exact:
                if d_weight is not None:
                    d_weight.addmm_(z.t(), here)
                if d_hidden is not None:
                    torch.mm(z, weight, out=d_hidden[part])
            else:
                g = z.to(hidden.dtype)
                if d_weight is not None:
                    d_weight += g.t() @ here
                if d_hidden is not None:
                    d_hidden[part] = g @ weight
        ctx.gradients = (d_hidden, d_weight, d_bias)
        ctx.temperature, ctx.types = temperature, (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "A chunked loss keeps its gradients for one backward pass; compute the loss again for a second one."
            )
        scale = grad / ctx.temperature  # of a float16 loss that is scaled up, in float32 still
        scaled = [None if x is None else x.mul_(scale).to(dtype) for x, dtype in zip(ctx.gradients, ctx.types)]
        ctx.gradients = None
        return *scaled, None, None, None, None, None, None


def as_multiplied(head: Head) -> Head:
    """The head with hidden states (N, D), in the type that a linear layer would multiply in: under autocast the half
    precision."""
    hidden, weight = head.hidden.flatten(0, -2), head.weight
    if _autocast(hidden):
        half = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(half), weight.to(half)
    return Head(hidden, weight, head.bias)


def _autocast(x: Tensor) -> bool:
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def check_head(name: str, head: Head) -> None:
    """Raise `UserError` for hidden states, matrix and bias that do not fit, or that are of two types outside
    autocast."""
    if head.weight.ndim != 2 or head.hidden.ndim < 2 or head.hidden.shape[-1] != head.weight.shape[1]:
        raise UserError(
            f"{name}: hidden states (..., D) and output matrix (V, D) must have one width D; given: "
            f"{tuple(head.hidden.shape)} and {tuple(head.weight.shape)}."
        )
    if head.bias is not None and head.bias.shape != head.weight.shape[:1]:
        raise UserError(f"{name}: the bias must have shape ({len(head.weight)},); given: {tuple(head.bias.shape)}.")
    if head.hidden.dtype != head.weight.dtype and not _autocast(head.hidden):
        raise UserError(
            f"{name}: hidden states are {head.hidden.dtype} but the output matrix {head.weight.dtype}; they must have "
            "one type."
        )


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """hidden @ weight.T + bias into `out`, which is float32 whatever they are."""
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    else:
        out.copy_(hidden @ weight.t())
    return out if bias is None else out.add_(bias)
