"""PLD against the arrays of `pld`."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from parity.case import Case
from stillhouse.objectives.pld import pld_loss, pld_ranking, pld_steps


def loss(case: Case) -> None:
    student, teacher, labels, temperature = (
        case.leaf("student_logits"),
        case["teacher_logits"],
        case["labels"],
        case.params["tau_T"],
    )
    ranking = pld_ranking(teacher, labels)
    case.close("ranking", ranking)
    case.close("alpha", F.softmax(teacher / temperature, dim=1).gather(1, ranking))
    rounding = torch.finfo(torch.float32).eps * float(student.detach().abs().max())
    case.close("step_nll", pld_steps(student, ranking), atol=max(1e-6, rounding))
    value = pld_loss(student, teacher, labels, temperature)
    value.backward()
    case.close("loss", value)
    case.close_grad("student_logits")


ADAPTERS = {"loss": loss}
