"""The benchmark's mixing, losses, schedule and weight decay against the arrays of `pca`."""

from __future__ import annotations

import torch
from torch import nn

from parity.case import Case
from stillhouse.methods.datasets.pca import protocol


def cutmix(case: Case) -> None:
    case.close("y", protocol.cutmix(case["x"], case["index"], tuple(case["bbox"].tolist())), rtol=1e-6)


def mixup(case: Case) -> None:
    case.close("y", protocol.mixup(case["x"], case["index"], float(case["lam:f64"])), rtol=1e-6)


def labels_loss(case: Case) -> None:
    p = case.params
    soft, hard = case["student"].clone().requires_grad_(), case["student"].clone().requires_grad_()
    factor = p["temperature"] ** 2 if p["T2_scaling"] else 1.0
    soft_value = factor * protocol.label_loss(soft, case["y"], case["teacher"], p["temperature"])
    hard_value = protocol.label_loss(hard, case["y"])
    (soft_value + hard_value).backward()
    case.close("soft_loss", soft_value)
    case.close("hard_loss", hard_value)
    case.close_grad("student", soft, array="grad:student_soft")
    case.close_grad("student", hard, array="grad:student_hard")
    case.close("top_k_labels", protocol.top_k_labels(case["teacher"], p["top_k"]))


def schedule(case: Case) -> None:
    epochs = case.params["epochs"]
    case.close("lr_factor:f64", torch.tensor([protocol.cosine(e, epochs) for e in range(epochs)], dtype=torch.float64), rtol=1e-9, atol=1e-12)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    assert tuple(map(sorted, protocol.decay_groups(network))) == (sorted(case.params["decay_group"]), sorted(case.params["no_decay_group"]))


ADAPTERS = {"cutmix": cutmix, "mixup": mixup, "labels_loss": labels_loss, "schedule": schedule}
