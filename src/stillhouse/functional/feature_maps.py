"""Feature maps of any network in one form: (B, C, H, W), of one size for student and teacher, or pooled to (B, C)."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError

LAST_STAGES = ["stage:-3", "stage:-2", "stage:-1"]
"""The stages that the multi-stage classics use: all of a CIFAR network, the last three of four elsewhere."""

PREFIXES = (0, 1, 2, 5)
"""Tokens before the patches: none, a class token, a second for distillation, or a class token and four registers."""


def as_map(x: Tensor) -> Tensor:
    """A feature as a map (B, C, H, W).

    A map stays as it is. Tokens (B, L, D) fold to a square map (B, D, h, h) without the tokens before the patches. A vector (B, D) is a map of one pixel.

    Raises:
        UserError: tokens that make no square, or another number of axes.
    """
    if x.ndim == 4:
        return x
    if x.ndim == 2:
        return x[:, :, None, None]
    if x.ndim == 3:
        rows, length, width = x.shape
        prefix = next((p for p in PREFIXES if p < length and math.isqrt(length - p) ** 2 == length - p), None)
        if prefix is not None:
            side = math.isqrt(length - prefix)
            return x[:, prefix:].transpose(1, 2).reshape(rows, width, side, side)
    raise UserError(f"A feature of shape {tuple(x.shape)} cannot be read as a map (B, C, H, W): give a map, or tokens (B, L, D) of a square grid.")


def pooled(x: Tensor) -> Tensor:
    """A feature as a vector (B, C): the mean of a map over space, the class token (the first) of tokens (B, L, D), a vector as it is."""
    if x.ndim == 4:
        return x.mean(dim=(2, 3))
    if x.ndim == 3:
        return x[:, 0]
    if x.ndim == 2:
        return x
    raise UserError(f"A feature of shape {tuple(x.shape)} cannot be pooled; give a map (B, C, H, W), tokens (B, L, D) or a vector (B, C).")


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both features as maps, averaged (adaptive pooling) to the smaller height and the smaller width."""
    student, teacher = as_map(student), as_map(teacher)
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return tuple(x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (student, teacher))  # type: ignore[return-value]
