"""SP: samples that are alike for the teacher become alike for the student.

paper: Similarity-Preserving Knowledge Distillation
venue: ICCV 2019
arxiv: 1907.09682
task: classification
family: relations
use when: the two networks' features differ in every size, so that only relations between samples can be compared
needs: a layer of student and teacher

G = f f^T over the batch, rows of length 1; L = sum (G_t - G_s)^2 / B^2, weight 3000. Over many processes the batch is
that of all ranks. Labels are not used.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.functional import checks
from stillhouse.functional.gather import gather
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals


@full_precision
def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the batch's similarity matrices (eq. 4). (B, …) and (B, …), flattened per sample;
    other sizes may differ."""
    checks.same_rows("sp", student, teacher)
    return (similarity(teacher.detach()) - similarity(student)).square().mean()


@full_precision
def similarity(x: Tensor) -> Tensor:
    """(B, …) -> (B, B) of x x^T over flattened samples, each row of length 1."""
    flat = x.flatten(1)
    return F.normalize(flat @ flat.t())


class SP(Objective):
    """Similarity preservation.

    Args:
        student_layer, teacher_layer: the layers compared; the last stage as published.
    """

    name = "sp"
    default_weight = 3000.0

    def __init__(self, student_layer: str = "stage:-1", teacher_layer: str = "stage:-1") -> None:
        super().__init__()
        self.student_layer, self.teacher_layer = student_layer, teacher_layer
        self.needs = frozenset({f"student.tap:{student_layer}", f"teacher.tap:{teacher_layer}"})

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {
            "loss": sp_loss(
                gather(student.require(f"tap:{self.student_layer}")),
                gather(teacher.require(f"tap:{self.teacher_layer}").detach()),
            )
        }
