"""VID: the student's layers say as much as possible about the teacher's, by a Gaussian whose mean is regressed and
whose variance is learned.

paper: Variational Information Distillation for Knowledge Transfer
venue: CVPR 2019
arxiv: 1904.05835
task: classification
family: features
use when: some channels of the teacher cannot be predicted and should count less
needs: layers of student and teacher

L = mean 0.5 ((mu(f_s) - f_t)^2 / v + log v), summed over stages, weight 1; mu is three bias-free 1x1 convolutions with
ReLU between, v is learned per channel from 5 on. The terms can be negative. Labels are not used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.functional import checks
from stillhouse.functional.feature_maps import LAST_STAGES, map_tap, same_size
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals


@full_precision
def vid_loss(mean: Tensor, teacher: Tensor, log_scale: Tensor, eps: float = 1e-5) -> Tensor:
    """Negative Gaussian log-likelihood of the teacher's map, without its constant, mean over all entries (eq. 5).

    Args:
        mean: regressed map (B, C, H, W).
        teacher: map (B, C, H, W).
        log_scale: (C,); the variance is softplus(log_scale) + eps.
    """
    checks.same_shape("vid", mean, teacher)
    variance = F.softplus(log_scale) + eps
    error = (mean - teacher.detach()).square().mean((0, 2, 3))  # by channel, as the variance is
    return 0.5 * (error / variance + variance.log()).mean()


class Regressor(nn.Sequential):
    """mu of one stage: three 1x1 convolutions without bias, ReLU between, the first to the teacher's width."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__(
            nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
        )


class VID(Objective):
    """Variational information distillation.

    Args:
        initial_variance: of every channel at the start.
        student_layers, teacher_layers: the stages, pair by pair.
    """

    name = "vid"
    eps = 1e-5

    def __init__(
        self,
        initial_variance: float = 5.0,
        student_layers: list[str] = LAST_STAGES,
        teacher_layers: list[str] = LAST_STAGES,
    ) -> None:
        super().__init__()
        checks.options("vid", positive={"initial_variance - 1e-5": initial_variance - self.eps})
        checks.same_layers("vid", student_layers, teacher_layers)
        self.initial_variance, self.pairs = initial_variance, list(zip(student_layers, teacher_layers))
        self.needs = frozenset(f"student.tap:{s}" for s in student_layers) | frozenset(
            f"teacher.tap:{t}" for t in teacher_layers
        )

    def build(self, student: Signals, teacher: Signals, batch: Batch) -> None:
        widths = [(map_tap(student, s).shape[1], map_tap(teacher, t).shape[1]) for s, t in self.pairs]
        start = math.log(math.expm1(self.initial_variance - self.eps))
        self.regressors = nn.ModuleList(Regressor(*width) for width in widths)
        self.log_scales = nn.ParameterList(
            nn.Parameter(torch.full((teacher_channels,), start)) for _, teacher_channels in widths
        )

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        terms = []
        for (s, t), regressor, log_scale in zip(self.pairs, self.regressors, self.log_scales):
            f_s, f_t = same_size(map_tap(student, s), map_tap(teacher, t))
            terms.append(vid_loss(regressor(f_s), f_t, log_scale, self.eps))
        return {"loss": torch.stack(terms).sum()}
