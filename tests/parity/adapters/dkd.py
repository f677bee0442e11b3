"""Decoupled distillation against the arrays of `dkd`."""

from __future__ import annotations

from parity.case import Case
from stillhouse.objectives.dkd import dkd_loss


def loss(case: Case) -> None:
    terms = dkd_loss(case.leaf("student_logits"), case["teacher_logits"], case["labels"], **case.params)
    value = terms["target"] + terms["non_target"]
    value.backward()
    case.close("loss", value)
    case.close_grad("student_logits")


ADAPTERS = {"loss": loss}
