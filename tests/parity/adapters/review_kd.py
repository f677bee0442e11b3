"""Knowledge review, fusion and loss, against the arrays of `review_kd`."""

from __future__ import annotations

from parity.case import Case
from stillhouse.functional.hierarchical_context import hcl_loss
from stillhouse.objectives.review_kd import ABF


def hcl(case: Case) -> None:
    value = hcl_loss(case.leaf("student"), case["teacher"], **case.params)
    value.backward()
    case.close("loss", value)
    case.close_grad("student")


def abf(case: Case) -> None:
    p = case.params
    fusion = case.load(ABF(p["in_channel"], p["mid_channel"], p["out_channel"], p["fuse"])).train(p["mode"] == "train")
    shape = case["out" if "out" in case else "residual"].shape
    out, residual = fusion(case["x"], case["y"] if p["fuse"] else None, tuple(shape[2:]))
    case.close("out", out)
    case.close("residual", residual)


ADAPTERS = {"hcl": hcl, "abf": abf}
