"""KD: the student matches the teacher's softened class probabilities.

paper: Distilling the Knowledge in a Neural Network
venue: NIPS Deep Learning Workshop 2014
arxiv: 1503.02531
task: classification
family: logits
use when: teacher and student score the same classes; the baseline of every other logit objective
needs: teacher logits

L = T^2 * mean KL(softmax(z_t / T) || softmax(z_s / T)). The published setting weighs it 0.9 and 0.1 for the
cross-entropy (`ce`). An ensemble teaches the mean of its members' softened probabilities. Of tokens and pixels those
count whose label is not -100; labels are not read otherwise. Of a teacher that is known by its top k alone, the k
classes and all others as one are compared (see `kd_top_loss`).
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.functional import checks
from stillhouse.functional.counting import both, counted, counted_mean, step_count
from stillhouse.functional.divergences import kl_divergence, kl_terms, standardise
from stillhouse.functional.precision import full_precision
from stillhouse.functional.token_losses import coarse_log_probs, coarse_logits, forward_kl_rows
from stillhouse.signals import Batch, Signals, TopK, log_softmax


@full_precision
def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, counts: Tensor | None = None
) -> Tensor:
    """T^2 times the mean KL divergence at temperature T; Hinton et al. 2015, section 2.

    Args:
        student_logits, teacher_logits: (..., C); the teacher's are a constant.
        temperature: T, of both.
        counts: (...,) True where a position counts; default: all.
    """
    teacher_log_probs = log_softmax(teacher_logits.detach() / temperature)
    checks.same_classes("kd", student_logits, teacher_log_probs)
    return temperature**2 * kl_divergence(student_logits, teacher_log_probs, temperature, counts)


@full_precision
def kd_top_loss(student_logits: Tensor, top: TopK, temperature: float = 4.0) -> Tensor:
    """T^2 times the mean KL divergence of k + 1 events, the k classes and all others as one; logits (..., C) -> scalar.

    At T = 1 both sides' events are exact. At another T the student's are too; what the teacher's tail becomes is not
    known, and is taken as if its mass were even over the other classes. Rows of which nothing is known (all mass in the
    tail) do not count; a row may know fewer than k classes (the others are minus infinity, at an index that the row
    names already).
    """
    return temperature**2 * counted_mean(*kd_top_rows(student_logits, top, temperature))


@full_precision
def kd_top_rows(student_logits: Tensor, top: TopK, temperature: float) -> tuple[Tensor, Tensor]:
    """The divergence of each row, (...,), without T^2, and whether anything is known of it, (...,)."""
    known = top.log_probs > -math.inf
    events = coarse_logits(student_logits, top.indices, temperature)
    events = events.masked_fill(F.pad(~known, (0, 1)), -math.inf)
    return forward_kl_rows(events, coarse_log_probs(top, student_logits.shape[-1], temperature).detach()), known[..., 0]


@full_precision
def kd_terms(student_logits: Tensor, teacher_log_probs: Tensor, temperature: float) -> Tensor:
    """The divergence of each class, without T^2: p (log p - log q), (..., C) and (..., C) at T -> (..., C)."""
    checks.same_classes("kd", student_logits, teacher_log_probs)
    return kl_terms(student_logits / temperature, teacher_log_probs.detach())


class KD(Objective):
    """Knowledge distillation of logits.

    Args:
        temperature: softens both distributions.
        standardise: standardise both logits per row first (arXiv 2403.01427), which takes the logits of all classes.
    """

    name = "kd"
    needs = frozenset({"student.logits", "teacher.logits"})
    default_weight = 0.9
    positions = True

    def __init__(self, temperature: float = 4.0, standardise: bool = False) -> None:
        super().__init__()
        checks.options("kd", positive={"temperature": temperature})
        self.temperature, self.standardise = temperature, standardise
        self.reads_top = not standardise

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        logits, heat = student.require("logits"), self.temperature
        counts = counted(batch, logits.shape[:-1])
        if self.standardise:
            values = kd_terms(standardise(logits), log_softmax(standardise(teacher.log_probs()) / heat), heat)
        elif teacher.only_top is not None:
            values, known = kd_top_rows(logits, teacher.only_top, heat)
            counts = both(counts, known)
        else:
            values = kd_terms(logits, teacher.log_probs(heat), heat)
        count = step_count(batch, logits[..., 0], counts, share=self.training)
        return {"loss": heat**2 * counted_mean(values, counts, count)}
