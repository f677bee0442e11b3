"""The injector's loss, its projection, the gradient's share, and the weight's update: the arrays of `rt_detrv4`."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from parity.case import Case
from stillhouse.objectives.rt_detrv4 import gradient_share, gradient_sum, injection_loss, modulated


def distill(case: Case) -> None:
    loss = injection_loss(case.leaf("student"), case["teacher"])
    loss.backward()
    case.close("loss", loss)
    case.close_grad("student")


def dsi_project(case: Case) -> None:
    weight, bias = case.weights["weight"].requires_grad_(), case.weights.get("bias")
    projected = F.linear(case.leaf("f5").movedim(1, -1), weight, bias).movedim(-1, 1)
    loss = injection_loss(projected, case["teacher"])
    weighted = case.params.get("weight", 1.0) * loss
    weighted.backward()
    for name, value in (("projected", projected), ("loss", loss), ("weighted", weighted)):
        if name in case:
            case.close(name, value)
    case.close_grad("f5")
    if "grad:weight" in case:
        case.close_grad("weight", weight)


def gam_percentage(case: Case) -> None:
    gradients, prefix = case.under("g"), case.params["encoder_prefix"]
    inside = [g for name, g in gradients.items() if name.startswith(prefix)]
    share = gradient_share(inside, list(gradients.values()))
    total = gradient_sum(list(gradients.values()))
    if "missing" in case.params and not (total > 0 and total.isfinite()):  # such a step does not count
        share = torch.full_like(share, case.params["missing"])
    case.close("percentage", share)


def gam_update(case: Case) -> None:
    columns = case.params["columns"]
    found = []
    for row in case["inputs"].tolist():
        given = dict(zip(columns, row))
        fallback = given.get("default_weight")
        found.append(
            modulated(
                given["current_weight"],
                given["avg_percentage"],
                given["rho"],
                given["delta"],
                fallback,
                final=bool(given.get("in_no_aug_phase", 0)),
            )
        )
    case.close("new_weight", torch.tensor(found, dtype=case["new_weight"].dtype))


ADAPTERS = {
    "distill": distill,
    "dsi_project": dsi_project,
    "gam_percentage": gam_percentage,
    "gam_update": gam_update,
}
