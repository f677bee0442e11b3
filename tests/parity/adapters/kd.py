"""Hinton's KD against the arrays of `kd`."""

from __future__ import annotations

from parity.case import Case
from stillhouse.objectives.kd import kd_loss


def loss(case: Case) -> None:
    value = kd_loss(case.leaf("student_logits"), case["teacher_logits"], **case.params)
    value.backward()
    case.close("loss", value)
    case.close_grad("student_logits")


ADAPTERS = {"loss": loss}
