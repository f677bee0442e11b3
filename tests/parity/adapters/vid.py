"""Variational information distillation against the arrays of `vid`."""

from __future__ import annotations

from torch import nn

from parity.case import Case
from stillhouse.functional.feature_maps import same_size
from stillhouse.objectives.vid import Regressor, vid_loss


def loss(case: Case) -> None:
    student, teacher = same_size(case.leaf("student"), case["teacher"])
    regressor = Regressor(student.shape[1], teacher.shape[1])
    for name, weight in case.weights.items():  # its middle may have a width of its own
        regressor[int(name.partition(".")[0])] = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False)
    case.load(regressor)
    value = vid_loss(regressor(student), teacher, case.leaf("log_scale"), case.params["eps"])
    value.backward()
    case.close("loss", value)
    case.close_grad("student")
    case.close_grad("log_scale")


ADAPTERS = {"loss": loss}
