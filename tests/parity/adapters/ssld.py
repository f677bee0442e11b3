"""SSLD's losses against the arrays of `ssld`."""

from __future__ import annotations

from parity.case import Case
from stillhouse.functional.divergences import soft_cross_entropy
from stillhouse.methods.classification.ssld import symmetric_kl


def losses(case: Case) -> None:
    p, t = case.params, case["teacher_logits"]
    found = {
        "js_v2_0": lambda s: symmetric_kl(s, t, p["eps_js_v2_0"]),
        "dml": lambda s: symmetric_kl(s, t, p["eps_dml"]),
        "dml_sum": lambda s: (
            p["num_classes"] * symmetric_kl(s, t, p["eps_dml"])
        ),  # the released factor, kept by mistake
        "soft_ce": lambda s: soft_cross_entropy(s, t.softmax(-1)),
    }
    for name, loss in found.items():
        s = case["student_logits"].clone().requires_grad_()
        value = loss(s)
        value.backward()
        case.close(f"loss_{name}", value, rtol=1e-4)
        case.close_grad("student_logits", s, array=f"grad:student_logits_{name}", rtol=1e-4)


ADAPTERS = {"losses": losses}
