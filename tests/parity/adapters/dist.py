"""DIST against the arrays of `dist`."""

from __future__ import annotations

from parity.case import Case
from stillhouse.distillation.objective import Progress
from stillhouse.objectives.dist import DIST
from stillhouse.signals import Signals


def loss(case: Case) -> None:
    p = case.params
    objective = DIST(p["beta"], p["gamma"], temperature=p["tau"])
    terms = objective(
        Signals(logits=case.leaf("student_logits")), Signals(logits=case["teacher_logits"]), {}, Progress()
    )
    value = terms["inter"] + terms["intra"]
    value.backward()
    case.close("loss", value)
    case.close_grad("student_logits")


ADAPTERS = {"loss": loss}
