"""SinKD against the arrays of `sinkd`."""

from __future__ import annotations

from parity.case import Case
from stillhouse.distillation.objective import Progress
from stillhouse.objectives.ce import cross_entropy
from stillhouse.objectives.sinkd import SinKD, sinkhorn_cost, sinkhorn_distance, sinkhorn_plan
from stillhouse.signals import Signals

CLOSE = {"rtol": 1e-4, "atol": 1e-6}
GRAD = {"rtol": 2e-3, "atol": 1e-5}


def sinkhorn(case: Case) -> None:
    p = case.params
    student, teacher = case.leaf("student_logits"), case["teacher_logits"]
    cost = sinkhorn_cost((student / p["temperature"]).softmax(1), (teacher / p["temperature"]).softmax(1))
    case.close("cost", cost, **CLOSE)
    case.close("plan", sinkhorn_plan(cost, p["epsilon"], p["n_iters"]), **CLOSE)
    value = sinkhorn_distance(student, teacher, p["temperature"], p["epsilon"], p["n_iters"])
    case.close("raw_loss", value, **CLOSE)
    case.close("scaled_loss", p["scale"] * value, **CLOSE)
    value.backward()
    case.close_grad("student_logits", **GRAD)


def total(case: Case) -> None:
    p = case.params
    anneal = p["anneal_total"] is not None
    objective = SinKD(
        alpha=p["alpha"],
        beta=p["beta"],
        scale=p["sinkhorn_scale"],
        kd_temperature=p["kd_temperature"],
        anneal=anneal,
        temperature=p["sinkhorn_temperature"],
        epsilon=p["epsilon"],
        iterations=p["n_iters"],
    )
    progress = Progress(epoch=p["anneal_epoch"], epochs=p["anneal_total"]) if anneal else Progress()
    student = case.leaf("student_logits")
    ce = cross_entropy(student, case["labels"])
    terms = objective(
        Signals(logits=student), Signals(logits=case["teacher_logits"]), {"label": case["labels"]}, progress
    )
    case.close("ce", ce, **CLOSE)
    for name, weight in (("kd", p["alpha"]), ("sinkhorn", p["beta"])):
        if weight:
            case.close(name, terms[name] / weight, **CLOSE)
    value = (1 - p["alpha"]) * ce + terms["kd"] + terms["sinkhorn"]
    case.close("total", value, **CLOSE)
    value.backward()
    case.close_grad("student_logits", **GRAD)


ADAPTERS = {"sinkhorn": sinkhorn, "total": total}
