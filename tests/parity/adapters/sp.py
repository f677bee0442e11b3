"""Similarity preservation against the arrays of `sp`."""

from __future__ import annotations

from parity.case import Case
from stillhouse.objectives.sp import sp_loss


def loss(case: Case) -> None:
    value = sp_loss(case.leaf("student"), case["teacher"], **case.params)
    value.backward()
    case.close("loss", value)
    case.close_grad("student")


ADAPTERS = {"loss": loss}
