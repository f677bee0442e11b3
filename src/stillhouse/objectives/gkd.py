"""GKD: forward KL, reverse KL and what lies between them, token by token.

paper: On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes
venue: ICLR 2024
arxiv: 2306.13649
task: language
family: logits
use when: teacher and student share a vocabulary, and covering all of the teacher's modes should be traded for staying
in them
needs: teacher logits; labels or `mask` say which tokens count

The loss of the paper: the generalised Jensen-Shannon divergence, beta KL(p || m) + (1 - beta) KL(q || m) with m = beta
p + (1 - beta) q; beta 0 is the forward KL of ordinary distillation, beta 1 the reverse KL, as in TRL. Which sequences
it is lowered on, the data's or the student's own, is the method's choice. No factor T^2. Mean over the tokens that
count; also for (B, C) logits. A teacher's top k (`Signals.top`) are compared as k tokens and all others as one; tokens
of which it says nothing do not count. Where the student gives the taps `hidden` and `output_weight` in the place of
logits, no tensor of logits is ever made.
"""

from __future__ import annotations

import math

from torch import Tensor

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.functional import checks
from stillhouse.functional.chunked import linear_divergence
from stillhouse.functional.counting import Reduction, both, counted, counted_mean, step_count
from stillhouse.functional.heads import head_of
from stillhouse.functional.precision import full_precision
from stillhouse.functional.token_losses import (
    check_beta,
    check_vocabulary,
    coarse,
    jsd_rows,
)
from stillhouse.signals import Batch, Signals, TopK


@full_precision
def gkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    count: Tensor | float | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Generalised Jensen-Shannon divergence at a temperature, the mean over the tokens that count; eq. 1 of the paper.

    Args:
        student_logits, teacher_logits: (..., V); the teacher's are a constant and may be log-probabilities.
        mask, count, reduction: see `counted_mean`.

    Raises:
        UserError: shapes that do not fit, or beta outside [0, 1].
    """
    check_vocabulary("gkd", student_logits.shape[-1], teacher_logits.shape[-1])
    checks.same_classes("gkd", student_logits, teacher_logits)
    teacher_log_probs = (teacher_logits.detach() / temperature).log_softmax(-1)
    return counted_mean(jsd_rows(student_logits / temperature, teacher_log_probs, beta), mask, count, reduction)


class GKD(Objective):
    """Generalised Jensen-Shannon divergence of tokens.

    Args:
        beta: from 0, the forward KL, to 1, the reverse KL.
        temperature: of both distributions.
    """

    name = "gkd"
    needs = frozenset({"student.logits", "teacher.logits"})
    positions = True
    reads_top = True
    reads_hidden = True

    def __init__(self, beta: float = 0.5, temperature: float = 1.0) -> None:
        super().__init__()
        check_beta("gkd", beta)
        checks.options("gkd", positive={"temperature": temperature})
        self.beta, self.temperature = beta, temperature

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        if student.logits is None:
            return {"loss": self._from_hidden(student, teacher, batch)}
        mask = counted(batch, student.logits.shape[:-1])
        top = teacher.only_top
        if top is not None:
            events = coarse(student.logits, top, self.temperature)
            rows = jsd_rows(events.logits, events.log_probs, self.beta)
            mask = both(mask, events.known)
            return {"loss": counted_mean(rows, mask, step_count(batch, rows, mask, share=self.training))}
        count = step_count(batch, student.logits[..., 0], mask, share=self.training)
        targets = teacher.log_probs(self.temperature).detach()
        check_vocabulary("gkd", student.logits.shape[-1], targets.shape[-1])
        checks.same_classes("gkd", student.logits, targets)
        logits = student.logits if self.temperature == 1 else student.logits.float() / self.temperature
        return {"loss": counted_mean(jsd_rows(logits, targets, self.beta), mask, count)}

    def _from_hidden(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:
        head = head_of(student, "student")
        mask = counted(batch, head.hidden.shape[:-1])
        source = (
            teacher.logits
            if teacher.logits is not None
            else teacher.top
            if teacher.top is not None
            else head_of(teacher, "teacher")
        )
        if isinstance(source, TopK):
            mask = both(mask, source.log_probs[..., 0] > -math.inf)
        count = step_count(batch, head.hidden[..., 0], mask, share=self.training)
        return linear_divergence(head, source, beta=self.beta, temperature=self.temperature, mask=mask, count=count)
