"""NKD and USKD against the arrays of `nkd_uskd`."""

from __future__ import annotations

from torch import nn

from parity.case import Case
from stillhouse.objectives.nkd_uskd import nkd_loss, uskd_loss


def nkd(case: Case) -> None:
    terms = nkd_loss(
        case.leaf("student_logits"), case["teacher_logits"], case["labels"], case.params["temp"], case.params["gamma"]
    )
    value = terms["target"] + terms["non_target"]
    value.backward()
    case.close("loss_target_term", terms["target"])
    case.close("loss", value)
    case.close_grad("student_logits")


def uskd(case: Case) -> None:
    p = case.params
    fc = nn.Linear(case["fea_mid"].shape[1], case["student_logits"].shape[1])
    case.load(fc, prefix="fc.")
    terms = uskd_loss(
        case.leaf("student_logits"), fc(case.leaf("fea_mid")), case["labels"], p["alpha"], p["beta"], p["mu"]
    )
    value = terms["target"] + terms["non_target"] + terms["weak"]
    value.backward()
    ones = uskd_loss(case["student_logits"], fc(case["fea_mid"]), case["labels"], alpha=1.0, beta=1.0, mu=1.0)
    case.close("term_target", ones["target"])
    case.close("term_nontarget", ones["non_target"])
    case.close("term_weak_mu1", ones["weak"])
    case.close("loss", value)
    case.close_grad("student_logits")
    case.close_grad("fea_mid")
    case.close_grad("fc.weight", fc.weight)
    case.close_grad("fc.bias", fc.bias)


ADAPTERS = {"nkd": nkd, "uskd": uskd}
