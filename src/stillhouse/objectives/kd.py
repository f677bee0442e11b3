"""KD: the student matches the teacher's softened class probabilities.

paper: Distilling the Knowledge in a Neural Network
venue: NIPS Deep Learning Workshop 2014
arxiv: 1503.02531
task: classification
family: logits
use when: teacher and student score the same classes; the baseline of every other logit objective
needs: teacher logits

L = T^2 * mean KL(softmax(z_t / T) || softmax(z_s / T)). The published setting weighs it 0.9 beside 0.1 of the cross-entropy (`ce`). An ensemble
teaches the mean of its members' softened probabilities. Logits (B, L, V) count every token whose label is not -100. Labels are not used otherwise.
Of a teacher that is known by its top k alone, the k classes and all others as one are compared (see `kd_top_loss`).
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.errors import UserError
from stillhouse.functional import checks
from stillhouse.functional.divergences import kl_divergence, standardise
from stillhouse.functional.precision import full_precision
from stillhouse.functional.token_losses import coarse_log_probs, coarse_logits, forward_kl_rows, step_count, token_mean
from stillhouse.signals import Batch, Signals, TopK


@full_precision
def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 times the mean KL divergence at temperature T. (..., C) and (..., C) -> scalar. Hinton et al. 2015, section 2."""
    checks.same_classes("kd", student_logits, teacher_logits)
    return temperature**2 * kl_divergence(student_logits, F.log_softmax(teacher_logits.detach() / temperature, dim=-1), temperature)


@full_precision
def kd_top_loss(student_logits: Tensor, top: TopK, temperature: float = 4.0) -> Tensor:
    """T^2 times the mean KL divergence of k + 1 events, the k classes and all others as one; logits (..., C) -> scalar.

    At T = 1 both sides' events are exact. At another T the student's are too; what the teacher's tail becomes is not known, and is taken as if its mass
    were even over the other classes. Rows of which nothing is known (all mass in the tail) do not count; a row may know fewer than k classes (the others
    are minus infinity, at an index that the row names already).
    """
    return temperature**2 * token_mean(*kd_top_rows(student_logits, top, temperature))


@full_precision
def kd_top_rows(student_logits: Tensor, top: TopK, temperature: float) -> tuple[Tensor, Tensor]:
    """The divergence of each row, (...,), without T^2, and whether anything is known of it, (...,)."""
    known = top.log_probs > -math.inf
    events = coarse_logits(student_logits, top.indices, temperature)
    events = events.masked_fill(F.pad(~known, (0, 1)), -math.inf)
    return forward_kl_rows(events, coarse_log_probs(top, student_logits.shape[-1], temperature).detach()), known[..., 0]


class KD(Objective):
    """Knowledge distillation of logits.

    Args:
        temperature: softens both distributions.
        standardise: standardise both logits per row first (arXiv 2403.01427).
    """

    name = "kd"
    needs = frozenset({"student.logits", "teacher.logits"})
    default_weight = 0.9
    reads_top = True

    def __init__(self, temperature: float = 4.0, standardise: bool = False) -> None:
        super().__init__()
        checks.options("kd", positive={"temperature": temperature})
        self.temperature, self.standardise = temperature, standardise
        self.reads_top = not standardise

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        logits = student.logits
        assert logits is not None
        if self.standardise:
            return {"loss": kd_loss(standardise(logits), standardise(teacher.log_probs()), self.temperature)}
        mask = batch["label"] != -100 if logits.ndim == 3 and "label" in batch else None
        if teacher.top is not None and teacher.logits is None:
            if self.standardise:
                raise UserError("kd: standardise needs the logits of all classes, but the teacher is known by its top k; switch it off.")
            rows, known = kd_top_rows(logits, teacher.top, self.temperature)
            if mask is None:
                return {"loss": self.temperature**2 * token_mean(rows, known)}
            return {"loss": self.temperature**2 * token_mean(rows, known & mask, step_count(batch, rows, known & mask, share=self.training))}
        targets = teacher.log_probs(self.temperature).detach()
        checks.same_classes("kd", logits, targets)
        if mask is None:
            return {"loss": self.temperature**2 * kl_divergence(logits, targets, self.temperature)}
        rows = forward_kl_rows(logits.float() / self.temperature, targets)
        return {"loss": self.temperature**2 * token_mean(rows, mask, step_count(batch, rows, mask, share=self.training))}
