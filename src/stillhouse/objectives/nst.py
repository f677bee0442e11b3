"""NST: the distribution of the student's channel activations matches the teacher's, by a maximum mean discrepancy.

paper: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer
venue: arXiv 2017
arxiv: 1707.01219
task: classification
family: features
use when: both networks have spatial maps, of any widths
needs: layers of student and teacher

Each channel of a sample, flattened to length 1, is one draw; the kernel is (x . y)^2. L is summed over stages, weight 50. Labels are not used.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.functional import checks
from stillhouse.functional.feature_maps import LAST_STAGES, same_size
from stillhouse.functional.precision import full_precision
from stillhouse.objective import Objective, Progress
from stillhouse.signals import Batch, Signals


@full_precision
def nst_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of one stage: mean k(t, t) + mean k(s, s) - 2 mean k(s, t), per sample over pairs of channels (eq. 3).

    Args:
        student, teacher: maps (B, C, H, W), or tokens (B, L, D); sizes are brought to the smaller by average pooling, widths may differ.
    """
    student, teacher = same_size(student, teacher.detach())
    s, t = F.normalize(student.flatten(2), dim=2), F.normalize(teacher.flatten(2), dim=2)
    return _kernel(t, t).mean() + _kernel(s, s).mean() - 2 * _kernel(s, t).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """(B, Cx, N) and (B, Cy, N) -> (B, Cx, Cy) of (x . y)^2."""
    return (x @ y.transpose(1, 2)).square()


class NST(Objective):
    """Neuron selectivity transfer.

    Args:
        student_layers, teacher_layers: the stages, pair by pair.
    """

    name = "nst"
    default_weight = 50.0

    def __init__(self, student_layers: list[str] = LAST_STAGES, teacher_layers: list[str] = LAST_STAGES) -> None:
        super().__init__()
        checks.same_layers("nst", student_layers, teacher_layers)
        self.pairs = list(zip(student_layers, teacher_layers))
        self.needs = frozenset(f"student.tap:{s}" for s in student_layers) | frozenset(f"teacher.tap:{t}" for t in teacher_layers)

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {"loss": torch.stack([nst_loss(student.taps[s], teacher.taps[t]) for s, t in self.pairs]).sum()}
