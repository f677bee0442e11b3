"""Neuron selectivity transfer against the arrays of `nst`."""

from __future__ import annotations

from parity.case import Case
from stillhouse.objectives.nst import nst_loss


def loss(case: Case) -> None:
    value = nst_loss(case.leaf("student"), case["teacher"], **case.params)
    value.backward()
    case.close("loss", value)
    case.close_grad("student")


ADAPTERS = {"loss": loss}
