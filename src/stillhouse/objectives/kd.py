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
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from stillhouse.functional import checks
from stillhouse.functional.divergences import kl_divergence, standardise
from stillhouse.functional.precision import full_precision
from stillhouse.objective import Objective, Progress
from stillhouse.signals import Batch, Signals


@full_precision
def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 times the mean KL divergence at temperature T. (..., C) and (..., C) -> scalar. Hinton et al. 2015, section 2."""
    checks.same_classes("kd", student_logits, teacher_logits)
    return temperature**2 * kl_divergence(student_logits, F.log_softmax(teacher_logits.detach() / temperature, dim=-1), temperature)


class KD(Objective):
    """Knowledge distillation of logits.

    Args:
        temperature: softens both distributions.
        standardise: standardise both logits per row first (arXiv 2403.01427).
    """

    name = "kd"
    needs = frozenset({"student.logits", "teacher.logits"})
    default_weight = 0.9

    def __init__(self, temperature: float = 4.0, standardise: bool = False) -> None:
        super().__init__()
        checks.options("kd", positive={"temperature": temperature})
        self.temperature, self.standardise = temperature, standardise

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        logits = student.logits
        assert logits is not None
        if self.standardise:
            return {"loss": kd_loss(standardise(logits), standardise(teacher.log_probs()), self.temperature)}
        targets = teacher.log_probs(self.temperature).detach()
        checks.same_classes("kd", logits, targets)
        mask = batch["label"] != -100 if logits.ndim == 3 and "label" in batch else None
        return {"loss": self.temperature**2 * kl_divergence(logits, targets, self.temperature, mask)}
