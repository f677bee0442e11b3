"""Logit standardisation: KD on logits of which every row has mean 0 and deviation 1, so that the student need not match
the teacher's scale.

paper: Logit Standardization in Knowledge Distillation
venue: CVPR 2024
arxiv: 2403.01427
task: classification
family: logits
use when: the teacher is much larger than the student, so that their logits differ in range
needs: teacher logits

L = T^2 * KL at temperature T of (z - mean) / (eps + std) per row, weight 9 to the cross-entropy's 1. The objectives kd,
dkd and nkd take
`standardise: true` for the same on their own loss. Labels say what counts.
"""

from __future__ import annotations

from torch import Tensor

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.functional import checks
from stillhouse.functional.counting import counted, step_count
from stillhouse.functional.divergences import kl_divergence, standardise
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals, log_softmax


@full_precision
def standardised_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 2.0,
    t_squared: bool = True,
    counts: Tensor | None = None,
    count: Tensor | float | None = None,
) -> Tensor:
    """KL divergence of standardised logits at a temperature; (..., C) and (..., C) -> scalar (algorithm 2 of the
    paper).

    Args:
        student_logits, teacher_logits: (..., C), at least two classes; the teacher's may be log-probabilities.
        temperature: the base temperature, on top of each row's own deviation.
        t_squared: multiply by temperature^2, as the authors' code does.
        counts, count: see `stillhouse.functional.divergences.kl_divergence`.
    """
    checks.same_classes("logit_standardisation", student_logits, teacher_logits)
    teacher_log_probs = log_softmax(standardise(teacher_logits.detach()) / temperature)
    divergence = kl_divergence(standardise(student_logits), teacher_log_probs, temperature, counts, count)
    return (temperature**2 if t_squared else 1.0) * divergence


class LogitStandardisation(Objective):
    """KD on standardised logits.

    Args:
        temperature: the base temperature.
        t_squared: multiply by temperature^2.
    """

    name = "logit_standardisation"
    needs = frozenset({"student.logits", "teacher.logits"})
    positions = True
    default_weight = 9.0

    def __init__(self, temperature: float = 2.0, t_squared: bool = True) -> None:
        super().__init__()
        checks.options("logit_standardisation", positive={"temperature": temperature})
        self.temperature, self.t_squared = temperature, t_squared

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        logits = student.require("logits")
        counts = counted(batch, logits.shape[:-1])
        count = step_count(batch, logits[..., 0], counts, share=self.training)
        return {
            "loss": standardised_kd_loss(logits, teacher.log_probs(), self.temperature, self.t_squared, counts, count)
        }
