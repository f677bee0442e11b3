"""TAID and its baselines against the arrays of `taid`."""

from __future__ import annotations

from typing import get_args

import torch

from parity.case import Case
from stillhouse.distillation.objective import Progress
from stillhouse.functional.counting import counted_mean
from stillhouse.functional.token_losses import cross_entropy_rows
from stillhouse.objectives.taid import TAID, taid_rows, taid_target
from stillhouse.objectives.token_divergence import Divergence, TokenDivergence
from stillhouse.signals import Signals


def loss(case: Case) -> None:
    student, teacher, mask, t = (
        case.leaf("student_logits"),
        case["teacher_logits"],
        case["mask"].bool(),
        case.params["t"],
    )
    value = counted_mean(taid_rows(student, teacher, t), mask)
    value.backward()
    case.close("target", taid_target(student, teacher, t).exp())
    case.close("loss", value)
    case.close("forward_ce", counted_mean(cross_entropy_rows(student, teacher.log_softmax(-1)), mask))
    largest = float(case["grad:student_logits"].abs().max()) if "grad:student_logits" in case else 0.0
    case.close_grad("student_logits", atol=max(1e-5 * largest, 1e-8))  # at t = 0 there is none but rounding


def schedule(case: Case) -> None:
    p = case.params
    taid = TAID(
        p["t_start"], p["t_end"], p["alpha"], p["beta"], not p["disable_adaptive"], total_steps=p["total_steps"]
    )
    teacher, batch, seen = Signals(logits=case["teacher_logits"]), {"mask": case["mask"].bool()}, []
    for step, logits in enumerate(case["student_logits"]):
        value = taid(Signals(logits=logits), teacher, batch, Progress(step=step))["loss"]
        seen.append(torch.stack([value, taid.t, taid.momentum]))
    for name, values in zip(("losses", "t_after", "momentum_after"), torch.stack(seen).t()):
        case.close(name, values)


NAMES = {
    "fkl": "forward",
    "rkl": "reverse",
    "tvd": "total_variation",
    "js": "js",
    "adaptive_kl": "adaptive",
    "skew_fkl": "skew_forward",
    "skew_rkl": "skew_reverse",
}
SHARES = {"js": "js_weight", "adaptive_kl": "head_threshold", "skew_fkl": "skew", "skew_rkl": "skew"}


def baseline_losses(case: Case) -> None:
    assert set(NAMES.values()) == set(get_args(Divergence))
    for theirs, ours in NAMES.items():
        objective = TokenDivergence(ours, case.params[SHARES[theirs]] if theirs in SHARES else None)
        student = case["student_logits"].clone().requires_grad_()
        value = objective(
            Signals(logits=student), Signals(logits=case["teacher_logits"]), {"mask": case["mask"].bool()}, Progress()
        )["loss"]
        value.backward()
        case.close(f"loss_{theirs}", value)
        case.close_grad("student_logits", student, array=f"grad_{theirs}")


ADAPTERS = {"taid_loss_t04": loss, "schedule": schedule, "baseline_losses": baseline_losses}
