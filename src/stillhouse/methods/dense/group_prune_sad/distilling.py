"""What the pruned network learns from the whole one: where its layers attend, and the scores and boxes of its heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision


@full_precision
def attention(features: Tensor) -> Tensor:
    """(B, H * W) of maps (B, C, H, W): the mean over the channels of the squares, of length 1; 0 where a map is 0."""
    return F.normalize(features.pow(2).mean(1).flatten(1), dim=1, eps=1e-12)


@full_precision
def attention_loss(students: list[Tensor], teachers: list[Tensor], betas: Sequence[float]) -> Tensor:
    """The sum over pairs of maps of beta times the mean squared difference of their attention. In float32, as beta may
    be 1e6.

    Raises:
        UserError: a pair of maps of unequal size.
    """
    terms = []
    for student, teacher, beta in zip(students, teachers, betas):
        if student.shape[-2:] != teacher.shape[-2:] or len(student) != len(teacher):
            raise UserError(
                f"group_prune_sad: maps of {tuple(student.shape)} and {tuple(teacher.shape)} cannot be compared; both "
                "networks need the same images and strides."
            )
        terms.append(beta * F.mse_loss(attention(student), attention(teacher.detach())))
    return torch.stack(terms).sum()


@full_precision
def class_loss(students: list[Tensor], teachers: list[Tensor], temperature: float = 3.0) -> Tensor:
    """Over the grids (B, A, H, W, 5 + K) of all heads, T² / B times the sum over their places of the KL divergence of
    objectness and classes, together as one distribution."""
    terms = []
    for student, teacher in zip(students, teachers):
        log_q = (student[..., 4:] / temperature).log_softmax(-1)
        log_p = (teacher[..., 4:].detach() / temperature).log_softmax(-1)
        divergence = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        terms.append(temperature**2 / len(student) * divergence)
    return torch.stack(terms).sum()


@full_precision
def box_loss(student: Tensor, teacher: Tensor, anchors: Tensor, weights: Tensor | None = None) -> Tensor:
    """The sum over places and coordinates of the squared difference of boxes (centre in its cell, size).

    Args:
        student, teacher: (..., 4 or more) numbers of the heads at the places that answer for a box.
        anchors: (..., 2) of these places, in whatever unit the boxes are compared.
        weights: (...,) of the places; default: 1.
    """

    def boxes(numbers: Tensor) -> Tensor:
        return torch.cat([numbers[..., :2].sigmoid(), numbers[..., 2:4].exp() * anchors], -1)

    squares = (boxes(student) - boxes(teacher.detach())).pow(2).sum(-1)
    return (squares if weights is None else squares * weights).sum()
