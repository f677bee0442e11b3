"""NST: the distribution of the student's channel activations matches the teacher's, by a maximum mean discrepancy.

paper: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer
venue: arXiv 2017
arxiv: 1707.01219
task: classification
family: features
use when: both networks have spatial maps, of any widths
needs: layers of student and teacher

Each channel of a sample, flattened to length 1, is one draw; the kernel is (x . y)^2. L is summed over stages, weight
50. Labels are not used.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.functional import checks
from stillhouse.functional.feature_maps import LAST_STAGES, map_tap, same_size
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals


@full_precision
def nst_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of one stage: mean k(t, t) + mean k(s, s) - 2 mean k(s, t), per sample over
    pairs of channels (eq. 3).

    Args:
        student, teacher: maps (B, C, H, W), or tokens (B, L, D); sizes are brought to the smaller by average pooling,
            widths may differ.
    """
    student, teacher = same_size(student, teacher.detach())
    s, t = student.flatten(2), teacher.flatten(2)
    if s.shape[2] <= min(
        s.shape[1], t.shape[1]
    ):  # sum_ij (x_i . y_j)^2 = <X'X, Y'Y> of the N x N products, the smaller ones then
        return (_by_place(t) - _by_place(s)).square().sum((1, 2)).mean()
    ss, st, tt = (
        s @ s.transpose(1, 2),
        s @ t.transpose(1, 2),
        t @ t.transpose(1, 2),
    )  # channels are brought to length 1 here, where they are small
    of_s, of_t = _inverse_length(ss), _inverse_length(tt)
    return _kernel(tt, of_t, of_t).mean() + _kernel(ss, of_s, of_s).mean() - 2 * _kernel(st, of_s, of_t).mean()


def _by_place(x: Tensor) -> Tensor:
    """(B, C, N) -> (B, N, N): mean over channels, of length 1, of their products at two places."""
    unit = F.normalize(x, dim=2)
    return unit.transpose(1, 2) @ unit / x.shape[1]


def _inverse_length(products: Tensor) -> Tensor:
    """1 / |x| of each channel, (B, C), from the products x . y of all channels (B, C, C); 0 channels count as of length
    1e-12, as in F.normalize."""
    return products.diagonal(dim1=1, dim2=2).clamp_min(1e-24).rsqrt()


def _kernel(products: Tensor, of_x: Tensor, of_y: Tensor) -> Tensor:
    """(B, Cx, Cy) of (x . y)^2 / (|x| |y|)^2."""
    return (products * of_x[:, :, None] * of_y[:, None, :]).square()


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
        self.needs = frozenset(f"student.tap:{s}" for s in student_layers) | frozenset(
            f"teacher.tap:{t}" for t in teacher_layers
        )

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {"loss": torch.stack([nst_loss(map_tap(student, s), map_tap(teacher, t)) for s, t in self.pairs]).sum()}
