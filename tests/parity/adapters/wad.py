"""WAD's knowledge, losses and selection, against the arrays of `wad`."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from parity.case import Case
from stillhouse.methods.classification.wad import (
    alpha_at,
    nt_xent,
    pseudo_labels,
    reliable,
    similarities,
    weighted_pseudo_loss,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def knowledge(case: Case) -> None:
    groups = [case[f"group_{k}"] for k in range(case.params["classes"])]
    similarity = similarities(case["unlabeled"], groups)
    label, weight = pseudo_labels(similarity)
    case.close("similarity", similarity, **CLOSE)
    case.close("pseudo_label", label)
    case.close("weight", weight, **CLOSE)


def contrastive(case: Case) -> None:
    loss = nt_xent(case.leaf("features"), case.params["temperature"])
    loss.backward()
    case.close("loss", loss, **CLOSE)
    case.close_grad("features", **CLOSE)


def student_objective(case: Case) -> None:
    known = F.cross_entropy(case.leaf("labeled_logits"), case["labels"])
    pool = weighted_pseudo_loss(case.leaf("unlabeled_logits"), case["pseudo_labels"], case["weights"])
    (known + pool).backward()
    for name, value in {"loss_labeled": known, "loss_unlabeled": pool, "loss": known + pool}.items():
        case.close(name, value, **CLOSE)
    case.close_grad("labeled_logits", **CLOSE)
    case.close_grad("unlabeled_logits", **CLOSE)


def reliable_selection(case: Case) -> None:
    ids, labels = reliable(
        case["similarity"],
        case["similarity_index"],
        case["student_logits"],
        case["student_index"],
        case.params["alpha"],
    )
    case.close("selected_index", ids)
    case.close("selected_label", labels)


def alpha_schedule(case: Case) -> None:
    p = case.params
    found = [alpha_at(int(step), p["alpha"], p["split"], p["power"], p["min"]) for step in case["step"]]
    case.close("alpha_at_step", torch.tensor(found, dtype=torch.float64), **CLOSE)


ADAPTERS = {
    "knowledge": knowledge,
    "nt_xent": contrastive,
    "student_objective": student_objective,
    "reliable_selection": reliable_selection,
    "alpha_schedule": alpha_schedule,
}
