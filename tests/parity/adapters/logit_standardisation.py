"""KD on standardised logits against the arrays of `logit_standardisation`."""

from __future__ import annotations

from parity.case import Case
from stillhouse.objectives.logit_standardisation import standardised_kd_loss


def loss(case: Case) -> None:
    value = standardised_kd_loss(case.leaf("student_logits"), case["teacher_logits"], **case.params)
    value.backward()
    case.close("loss", value)
    case.close_grad("student_logits")


ADAPTERS = {"loss": loss}
