"""Input checks that objectives share, with exact messages. None of them waits for a GPU: values are looked at only
where the tensor is on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from stillhouse.errors import UserError


def options(
    name: str,
    *,
    positive: Mapping[str, float] | None = None,
    non_negative: Mapping[str, float] | None = None,
    share: Mapping[str, float] | None = None,
) -> None:
    """Raise `UserError` where an option of the objective `name` is out of range: above 0, at least 0, or in [0, 1).

    >>> options("kd", positive={"temperature": 0})
    Traceback (most recent call last):
    stillhouse.errors.UserError: kd: temperature must be above 0; given: 0.
    """
    for key, value in (positive or {}).items():
        if not value > 0:
            raise UserError(f"{name}: {key} must be above 0; given: {value}.")
    for key, value in (non_negative or {}).items():
        if not value >= 0:
            raise UserError(f"{name}: {key} must be at least 0; given: {value}.")
    for key, value in (share or {}).items():
        if not 0 <= value < 1:
            raise UserError(f"{name}: {key} must be at least 0 and below 1; given: {value}.")


def same_layers(name: str, student_layers: Sequence[str], teacher_layers: Sequence[str]) -> None:
    """Raise `UserError` unless there are as many student as teacher layers, and at least one."""
    if not student_layers or len(student_layers) != len(teacher_layers):
        raise UserError(
            f"{name}: student_layers and teacher_layers must name as many layers, at least one; given: "
            f"{len(student_layers)} and {len(teacher_layers)}."
        )


def same_classes(name: str, student_logits: Tensor, teacher_logits: Tensor, *, at_least: int = 2) -> None:
    """Raise `UserError` unless both logits have one shape, floating values, and at least so many classes."""
    if student_logits.shape != teacher_logits.shape:
        raise UserError(
            f"{name}: the student's logits have shape {tuple(student_logits.shape)} but the teacher's "
            f"{tuple(teacher_logits.shape)}; both must score the same classes."
        )
    if not student_logits.is_floating_point() or not teacher_logits.is_floating_point():
        raise UserError(
            f"{name}: logits must be floating point; given: {student_logits.dtype} and {teacher_logits.dtype}."
        )
    if student_logits.shape[-1] < at_least:
        raise UserError(
            f"{name}: needs at least {at_least} classes; the logits have shape {tuple(student_logits.shape)}."
        )


def one_prediction_a_sample(name: str, logits: Tensor) -> None:
    """Raise `UserError` for logits that are not (B, C)."""
    if logits.ndim != 2:
        raise UserError(f"{name}: takes one prediction a sample, logits (B, C); given: {tuple(logits.shape)}.")


def same_rows(name: str, student: Tensor, teacher: Tensor) -> None:
    """Raise `UserError` unless both tensors hold as many samples."""
    if len(student) != len(teacher):
        raise UserError(
            f"{name}: the student gives {len(student)} samples but the teacher {len(teacher)} (shapes "
            f"{tuple(student.shape)}, {tuple(teacher.shape)})."
        )


def same_shape(name: str, student: Tensor, teacher: Tensor) -> None:
    """Raise `UserError` unless both maps (B, C, H, W) have one shape."""
    if student.shape != teacher.shape:
        raise UserError(
            f"{name}: the student's map has shape {tuple(student.shape)} but the teacher's {tuple(teacher.shape)}; "
            "they must be equal."
        )
