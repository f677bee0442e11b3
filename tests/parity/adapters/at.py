"""Attention transfer against the arrays of `at`."""

from __future__ import annotations

from parity.case import Case
from stillhouse.objectives.at import at_loss


def loss(case: Case) -> None:
    value = at_loss(case.leaf("student"), case["teacher"], **case.params)
    value.backward()
    case.close("loss", value)
    case.close_grad("student")


ADAPTERS = {"loss": loss}
