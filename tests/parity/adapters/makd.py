"""Class and aspect terms against the arrays of `makd`."""

from __future__ import annotations

from parity.case import Case
from stillhouse.methods.classification.makd.aspects import aspect_probs
from stillhouse.methods.classification.makd.method import aspect_loss
from stillhouse.objectives.ce import cross_entropy


def makd(case: Case) -> None:
    p = case.params
    targets = aspect_probs(case["yes_no_logits"]) if "yes_no_logits" in case else case["aspect_targets"]
    case.close("aspect_targets", targets, atol=1e-6)
    targets = case["aspect_targets"] if "aspect_targets" in case else targets  # noqa: SIM401
    out, classes = case.leaf("student_out"), p["num_classes"]
    assert out.shape[1] == classes + p["aspect_num"]
    case.close("class_logits", out[:, :classes])
    ce = p["ce_weight"] * cross_entropy(out[:, :classes], case["labels"])
    aspects = p["alpha"] * aspect_loss(out[:, classes:], targets)
    (ce + aspects).backward()
    case.close("loss_ce", ce)
    case.close("loss_makd", aspects)
    case.close("total", ce + aspects)
    case.close_grad("student_out")


ADAPTERS = {"makd_basic": makd, "makd_hard_targets": makd}
