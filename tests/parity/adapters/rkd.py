"""Relational distillation against the arrays of `rkd`."""

from __future__ import annotations

from parity.case import Case
from stillhouse.objectives.rkd import rkd_angle_loss, rkd_distance_loss


def loss(case: Case) -> None:
    p, student, teacher = case.params, case.leaf("student"), case["teacher"]
    value = p["distance_weight"] * rkd_distance_loss(student, teacher, p["squared"]) + p[
        "angle_weight"
    ] * rkd_angle_loss(student, teacher)
    value.backward()
    case.close("loss", value)
    case.close_grad("student")


ADAPTERS = {"loss": loss}
