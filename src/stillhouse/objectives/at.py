"""AT: the student's spatial attention (where its activations are strong) follows the teacher's, stage by stage.

paper: Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via Attention
Transfer
venue: ICLR 2017
arxiv: 1612.03928
task: classification
family: features
use when: both networks have spatial maps, of any widths
needs: layers of student and teacher

A = the flattened mean over channels of f^p, of length 1; L = mean over entries of (A_s - A_t)^2, summed over stages,
weight 1000. Labels are not used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.functional import checks
from stillhouse.functional.feature_maps import LAST_STAGES, map_tap, same_size
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals


@full_precision
def at_loss(student: Tensor, teacher: Tensor, p: int = 2) -> Tensor:
    """Mean squared difference of the attention maps of one stage.

    Args:
        student, teacher: maps (B, C, H, W), or tokens (B, L, D); sizes are brought to the smaller by average pooling,
            widths may differ.
        p: power of the activations.
    """
    student, teacher = same_size(student, teacher.detach())
    return (attention(student, p) - attention(teacher, p)).square().mean()


@full_precision
def attention(x: Tensor, p: int = 2) -> Tensor:
    """(B, C, H, W) -> (B, H*W): mean over channels of x^p, each row of length 1."""
    return F.normalize(PowerMean.apply(x, p).flatten(1))


class PowerMean(torch.autograd.Function):
    """x.pow(p).mean(1), whose gradient p x^(p-1) g / C is one product where autograd's own makes three maps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.p = p
        return x.pow(p).mean(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        share = (ctx.p / x.shape[1] * grad)[:, None]
        return (x if ctx.p == 2 else x.pow(ctx.p - 1)) * share, None


class AT(Objective):
    """Attention transfer.

    Args:
        p: power of the activations.
        student_layers, teacher_layers: the stages, pair by pair.
    """

    name = "at"
    default_weight = 1000.0

    def __init__(
        self, p: int = 2, student_layers: list[str] = LAST_STAGES, teacher_layers: list[str] = LAST_STAGES
    ) -> None:
        super().__init__()
        checks.options("at", positive={"p": p})
        checks.same_layers("at", student_layers, teacher_layers)
        self.p, self.pairs = p, list(zip(student_layers, teacher_layers))
        self.needs = frozenset(f"student.tap:{s}" for s in student_layers) | frozenset(
            f"teacher.tap:{t}" for t in teacher_layers
        )

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {
            "loss": torch.stack(
                [at_loss(map_tap(student, s), map_tap(teacher, t), self.p) for s, t in self.pairs]
            ).sum()
        }
