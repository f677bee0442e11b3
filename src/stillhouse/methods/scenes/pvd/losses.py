"""The losses of the three phases of progressive volume distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision
from stillhouse.nn.radiance_fields import FieldPoints

Distance = Literal["normL2", "L2", "normL1", "smoothL1"]


@dataclass(frozen=True)
class Rates:
    """Weights of the terms: of pixels, features, colours and log densities of points, and of a VM field's sparsity."""

    pixel: float = 1.0
    feature: float = 0.002
    color: float = 0.002
    density: float = 0.002
    sparsity: float = 1e-4


def distance(a: Tensor, b: Tensor, kind: Distance = "normL2") -> Tensor:
    """How far two arrays are apart: `normL2` the Frobenius norm of the whole, neither squared nor averaged, as
    released; `L2` the mean square; `normL1` the sum of absolute values; `smoothL1` with beta 0.05."""
    if kind == "normL2":
        return torch.linalg.vector_norm(a - b)
    if kind == "L2":
        return F.mse_loss(a, b)
    if kind == "normL1":
        return (a - b).abs().sum()
    return F.smooth_l1_loss(a, b, beta=0.05)


@full_precision
def phase_loss(
    phase: int,
    student: FieldPoints,
    teacher: FieldPoints,
    pixels: tuple[Tensor, Tensor] | None,
    rates: Rates,
    kind: Distance = "normL2",
    sparsity: Tensor | None = None,
) -> dict[str, Tensor]:
    """The weighted terms of a phase, by name: 1 features; 2 colours and log densities of points as well; 3 pixels too.

    Args:
        student, teacher: of the same points; the teacher's are constants.
        pixels: (R, 3) of the same rays, the student's and the teacher's; read in phase 3.
        sparsity: of a VM student's density, in phase 3.

    Raises:
        UserError: phase 1 between forms of which one has no features, or features of different widths.
    """
    terms: dict[str, Tensor] = {}
    if student.features is not None and teacher.features is not None:
        if student.features.shape != teacher.features.shape:
            raise UserError(
                f"pvd: the student's features have shape {tuple(student.features.shape)} but the teacher's "
                f"{tuple(teacher.features.shape)}; the two parts of both fields must meet at the same width."
            )
        terms["feature"] = rates.feature * distance(student.features, teacher.features.detach(), kind)
    elif phase == 1:
        raise UserError("pvd: phase 1 compares features, which a plenoxel field does not have; begin with phase 2.")
    if phase >= 2:
        terms["color"] = rates.color * distance(student.color, teacher.color.detach(), kind)
        terms["density"] = rates.density * distance(student.log_density, teacher.log_density.detach(), kind)
    if phase >= 3:
        if pixels is None:
            raise UserError("pvd: phase 3 compares pixels; render both fields.")
        terms["pixel"] = rates.pixel * distance(pixels[0], pixels[1].detach(), kind)
        if sparsity is not None:
            terms["sparsity"] = rates.sparsity * sparsity
    return terms
