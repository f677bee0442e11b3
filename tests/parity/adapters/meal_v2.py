"""MEAL V2 against the arrays of `meal_v2`: both losses, the discriminator's output, and every gradient."""

from __future__ import annotations

import torch

from parity.case import Case
from stillhouse.distillation.objective import Progress
from stillhouse.methods.classification.meal_v2 import Discriminator, MealV2, averaged
from stillhouse.signals import Signals


def two_teachers(case: Case) -> None:
    p = case.params
    assert len(case["teacher_logits"]) == p["num_teachers"]
    target, mean_logits = averaged(case["teacher_logits"])
    case.close("soft_label", target)
    case.close("mean_teacher_logits", mean_logits)

    objective = MealV2(sees=p["discriminator_input"], reduction=p["K"])
    student = Signals(logits=case.leaf("student_logits"))
    objective.build(student, Signals(), {})
    discriminator = objective.discriminator
    assert isinstance(discriminator, Discriminator)
    discriminator.to(case["student_logits"].dtype).load_state_dict(
        {name: w.flatten(1) if name.endswith("weight") else w for name, w in case.weights.items()}
    )
    terms = objective(
        student, Signals(members=tuple(Signals(logits=t) for t in case["teacher_logits"])), {}, Progress()
    )
    loss = terms["similarity"] + terms["discriminator"]
    loss.backward()

    log_prob = torch.log_softmax(case["student_logits"], dim=1)
    rows = (case["student_logits"], mean_logits) if p["discriminator_input"] == "logits" else (log_prob.exp(), target)
    case.close("student_log_prob", log_prob)
    case.close("disc_output", discriminator(torch.cat(rows)))
    case.close("g_loss", terms["similarity"])
    case.close("d_loss", terms["discriminator"])
    case.close("loss", loss)
    case.close_grad("student_logits")
    for name, parameter in discriminator.named_parameters():
        case.close(f"grad:D.{name}", parameter.grad.reshape(case[f"w:{name}"].shape), atol=1e-7)


ADAPTERS = {"two_teachers": two_teachers}
