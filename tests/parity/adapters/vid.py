"""Variational information distillation against the arrays of `vid`."""

from __future__ import annotations

from parity.case import Case
from stillhouse.functional.feature_maps import same_size
from stillhouse.objectives.vid import Regressor, vid_loss


def loss(case: Case) -> None:
    student, teacher = same_size(case.leaf("student"), case["teacher"])
    regressor = case.load(Regressor(student.shape[1], teacher.shape[1]))
    value = vid_loss(regressor(student), teacher, case.leaf("log_scale"), case.params["eps"])
    value.backward()
    case.close("loss", value)
    case.close_grad("student")
    case.close_grad("log_scale")


ADAPTERS = {"loss": loss}
