"""Probabilistic knowledge transfer against the arrays of `pkt`."""

from __future__ import annotations

from parity.case import Case
from stillhouse.objectives.pkt import pkt_loss


def loss(case: Case) -> None:
    value = pkt_loss(case.leaf("student"), case["teacher"], **case.params)
    value.backward()
    case.close("loss", value)
    case.close_grad("student")


ADAPTERS = {"loss": loss}
