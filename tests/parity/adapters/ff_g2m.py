"""The losses of FF-G2M and its ablations against the arrays of `ff_g2m`."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from parity.case import Case
from stillhouse.methods.graphs.ff_g2m import difference_log_probs, high_frequency_loss, low_frequency_loss
from stillhouse.methods.graphs.glnn import soft_label_loss

MODES = {0: ("low", "high"), 1: (), 2: ("soft",), 3: ("low",), 4: ("high",)}


def losses(case: Case) -> None:
    p, student, teacher, edges = case.params, case.leaf("student_logits"), case["teacher_logits"], case["edge_index"]
    ce = F.cross_entropy(student[case["train_idx"]], case["labels"][case["train_idx"]])
    terms = {
        "low": low_frequency_loss(student, teacher, edges),
        "high": high_frequency_loss(student, teacher, edges, p["tau"]),
        "soft": soft_label_loss(student, teacher),
    }
    mode = MODES[p["ablation_mode"]]
    total = p["lamb"] * ce + (1 - p["lamb"]) * sum(terms[t] for t in mode) if mode else ce
    total.backward()
    case.close("loss_ce", ce)
    case.close("loss_lfd", terms["low"])
    case.close("loss_hfd", terms["high"])
    case.close("loss_glnn_kd", terms["soft"])
    if "hfd_student_logp" in case:
        rows = len(case["hfd_student_logp"])
        case.close("hfd_student_logp", difference_log_probs(student, edges, p["tau"])[:rows])
    case.close("total", torch.as_tensor(total))
    case.close_grad("student_logits", rtol=1e-4)


ADAPTERS = {"full_loss": losses, "lfd_only": losses}
