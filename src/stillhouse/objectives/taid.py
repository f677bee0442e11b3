"""TAID: the student chases a target that lies a little ahead of itself on the way to the teacher.

paper: TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language Models
venue: ICLR 2025
arxiv: 2501.16937
task: language
family: logits
use when: the teacher is far stronger than the student; the student should be warm, as the target starts near itself
needs: teacher logits; labels or `mask` say which tokens count

Target: softmax of (1 - t) student + t teacher logits. t rises from t_start at least as a ramp over training, and faster
while the loss falls. It takes the place of the language model's loss (the authors' mixing ratio 1); list `ce` with it
to mix. The released code is followed: the loss is the cross-entropy with the target, which also drives t; `value: kl`
is the paper's KL, of equal gradient. Three departures: t moves in training mode only, over processes it is moved by
their mean loss, and a loss that is not finite, or of no token, leaves it as it is. With accumulation t moves each
micro-batch. t, the last loss and the momentum are saved with the run. The baselines of the released code are the
objective `token_divergence`. Where the student gives the taps `hidden` and `output_weight` in the place of logits, no
tensor of logits is ever made. Of a teacher's top k, the target mixes the logits of the k tokens and of all others as
one.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.errors import UserError
from stillhouse.functional import checks
from stillhouse.functional.chunked import linear_taid
from stillhouse.functional.counting import both, counted, counted_mean, step_count
from stillhouse.functional.heads import head_of
from stillhouse.functional.precision import full_precision
from stillhouse.functional.token_losses import check_vocabulary, coarse, cross_entropy_rows, forward_kl_rows
from stillhouse.signals import Batch, Signals

TINY = 1e-15  # of the relative change, as published


@torch.no_grad()
@full_precision
def taid_target(student_logits: Tensor, teacher_logits: Tensor, t: Tensor | float) -> Tensor:
    """log softmax((1 - t) student + t teacher), (..., V) and (..., V) -> (..., V), a constant; eq. 3 of the paper.

    A logit that is infinite in either has probability 0. The teacher's logits may be log-probabilities.
    """
    infinite = student_logits.isinf() | teacher_logits.isinf()
    mixed = ((1 - t) * student_logits + t * teacher_logits).masked_fill(infinite, -math.inf)
    return mixed.log_softmax(-1)


@full_precision
def taid_rows(
    student_logits: Tensor, teacher_logits: Tensor, t: Tensor | float, value: Literal["ce", "kl"] = "ce"
) -> Tensor:
    """Cross-entropy of the student with the target at t, or the KL from it, (..., V) and (..., V) -> (...,). The
    gradient of both is q - p_t."""
    target = taid_target(student_logits, teacher_logits, t)
    return cross_entropy_rows(student_logits, target) if value == "ce" else forward_kl_rows(student_logits, target)


@torch.no_grad()
def advance(
    t: Tensor,
    previous: Tensor,
    momentum: Tensor,
    loss: Tensor,
    ramp: float,
    t_end: float,
    alpha: float,
    beta: float,
    adaptive: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(t, last loss, momentum) after a loss: algorithm 1 of the paper. Scalars; the first loss, and one that is not
    finite, leave t and momentum.

    Args:
        previous: the last loss, infinite before the first.
        ramp: where the linear ramp stands, which t is never below.
    """
    change = (previous - loss) / (previous + TINY)
    moved = beta * momentum + (1 - beta) * change
    faster = t + alpha * torch.sigmoid(moved) * (1 - t) if adaptive else torch.zeros_like(t)
    after = faster.clamp_min(ramp).clamp_max(t_end)
    moves = previous.isfinite() & loss.isfinite()
    return (
        torch.where(moves, after, t),
        torch.where(loss.isfinite(), loss, previous),
        torch.where(moves, moved, momentum),
    )


PUBLISHED_ALPHA, PUBLISHED_STEPS = 5e-4, 15_600
"""How far t may move in a step, and the steps of the training that it was published for."""


class TAID(Objective):
    """Temporally adaptive interpolated distillation.

    Args:
        t_start, t_end: where the target starts and ends, from 0, the student itself, to 1, the teacher.
        alpha: how far t may move in a step; default: the published 5e-4 of 15,600 steps, in proportion to the steps
            of this training, so that t can run ahead of its ramp as far in a short one.
        beta: momentum of the relative fall of the loss.
        adaptive: whether t may move faster than the linear ramp.
        value: `ce` reports the cross-entropy with the target, `kl` the divergence.
        total_steps: optimiser steps of the ramp; default: the whole training.
    """

    name = "taid"
    needs = frozenset({"student.logits", "teacher.logits"})
    positions = True
    reads_hidden = True
    reads_top = True
    top_in_chunks = False
    t: Tensor
    previous: Tensor
    momentum: Tensor

    def __init__(
        self,
        t_start: float = 0.4,
        t_end: float = 1.0,
        alpha: float | None = None,
        beta: float = 0.99,
        adaptive: bool = True,
        value: Literal["ce", "kl"] = "ce",
        total_steps: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= t_start < 1 or not t_start <= t_end <= 1:
            raise UserError(
                f"taid: t_start must be from 0 to below 1, and t_end from t_start to 1; given: {t_start} and {t_end}."
            )
        if alpha is not None and not 0 <= alpha <= 1:
            raise UserError(f"taid: alpha must be from 0 to 1; given: {alpha}.")
        checks.options(
            "taid", share={"beta": beta}, positive={} if total_steps is None else {"total_steps": total_steps}
        )
        self.t_start, self.t_end, self.alpha, self.beta = t_start, t_end, alpha, beta
        self.adaptive, self.value, self.total_steps = adaptive, value, total_steps
        self.register_buffer("t", torch.tensor(t_start))
        self.register_buffer("previous", torch.tensor(math.inf))
        self.register_buffer("momentum", torch.tensor(0.0))

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        t = self.t.clone()
        if student.logits is None:
            head = head_of(student, "student")
            like, mask = head.hidden[..., 0], counted(batch, head.hidden.shape[:-1])
            source = head_of(teacher, "teacher") if teacher.logits is None else teacher.logits
            total = linear_taid(head, source, t, value=self.value, mask=mask, reduction="sum")
        else:
            logits, top, mask = student.logits, teacher.only_top, counted(batch, student.logits.shape[:-1])
            like = logits[..., 0]
            if top is not None:
                logits, targets, known = coarse(logits, top)
                mask = both(mask, known)
            else:
                targets = teacher.log_probs().detach()
                check_vocabulary("taid", logits.shape[-1], targets.shape[-1])
                checks.same_classes("taid", logits, targets)
            total = counted_mean(taid_rows(logits, targets, t, self.value), mask, reduction="sum")
        if self.training:
            self._follow(total, like.numel() if mask is None else mask.sum(), progress)
        return {"loss": total / step_count(batch, like, mask, share=self.training), "log:t": t}

    def pace(self, progress: Progress) -> float:
        """alpha, or its default for the steps of this training."""
        if self.alpha is not None:
            return self.alpha
        steps = self.total_steps or progress.epochs * progress.steps_per_epoch
        return min(PUBLISHED_ALPHA * PUBLISHED_STEPS / steps, 1.0) if steps else PUBLISHED_ALPHA

    @torch.no_grad()
    def _follow(self, total: Tensor, tokens: Tensor | int, progress: Progress) -> None:
        """Move t by the mean over the tokens of all processes; of no token, it is not a number, and t stays."""
        sums = torch.stack([total, torch.ones_like(total) * tokens])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        share = progress.fraction if self.total_steps is None else progress.step / self.total_steps
        ramp = self.t_start + (self.t_end - self.t_start) * share
        state = advance(
            self.t,
            self.previous,
            self.momentum,
            sums[0] / sums[1],
            ramp,
            self.t_end,
            self.pace(progress),
            self.beta,
            self.adaptive,
        )
        for buffer, value in zip((self.t, self.previous, self.momentum), state):
            buffer.copy_(value)
