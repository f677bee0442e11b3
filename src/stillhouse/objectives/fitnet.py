"""FitNet: a middle layer of the student, through a 1x1 convolution, regresses the teacher's.

paper: FitNets: Hints for Thin Deep Nets
venue: ICLR 2015
arxiv: 1412.6550
task: classification
family: features
use when: the student is thinner than the teacher and both have maps of like meaning half-way
needs: a layer of student and teacher

L = mean (conv(f_s) - f_t)^2, weight 100. The paper trains the hint first and then distils; here, as in most
comparisons, both run together (a weight schedule on the objectives gives the two stages). Labels are not used.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.functional import checks
from stillhouse.functional.feature_maps import map_tap, same_size
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals


@full_precision
def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error between maps (B, C, H, W) of one width; sizes are brought to the smaller by average pooling.
    Eq. 3 of the paper."""
    student, teacher = same_size(student, teacher.detach())
    checks.same_shape("fitnet", student, teacher)
    return F.mse_loss(student, teacher)


class FitNet(Objective):
    """Hint regression.

    Args:
        student_layer, teacher_layer: the guided and the hint layer; the second stage is the middle one of three.
    """

    name = "fitnet"
    default_weight = 100.0

    def __init__(self, student_layer: str = "stage:2", teacher_layer: str = "stage:2") -> None:
        super().__init__()
        self.student_layer, self.teacher_layer = student_layer, teacher_layer
        self.needs = frozenset({f"student.tap:{student_layer}", f"teacher.tap:{teacher_layer}"})

    def build(self, student: Signals, teacher: Signals, batch: Batch) -> None:
        f_s, f_t = map_tap(student, self.student_layer), map_tap(teacher, self.teacher_layer)
        self.regressor = nn.Conv2d(f_s.shape[1], f_t.shape[1], 1)

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        f_s, f_t = same_size(map_tap(student, self.student_layer), map_tap(teacher, self.teacher_layer))
        return {"loss": hint_loss(self.regressor(f_s), f_t)}
