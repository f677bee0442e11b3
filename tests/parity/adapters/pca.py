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
    p = case.params
    count = len(case["lr_factor:f64"]) if "lr_factor:f64" in case else p["epochs"]
    found = [protocol.cosine(e, p["epochs"]) for e in range(count)]
    case.close("lr_factor:f64", torch.tensor(found, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    network = _layers(p["decay_group"], p["no_decay_group"])
    assert tuple(map(sorted, protocol.decay_groups(network))) == (sorted(p["decay_group"]), sorted(p["no_decay_group"]))


def _layers(decayed: list[str], others: list[str]) -> nn.Sequential:
    """A network with these parameters: convolutions where a weight decays, batch norms where it does not."""
    names = [*decayed, *others]
    layers: list[nn.Module] = []
    for i in range(1 + max(int(name.partition(".")[0]) for name in names)):
        if f"{i}.weight" in others:
            layers.append(nn.BatchNorm2d(4))
        else:
            layers.append(nn.Conv2d(4, 4, 3, bias=f"{i}.bias" in names) if f"{i}.weight" in names else nn.Flatten())
    return nn.Sequential(*layers)


ADAPTERS = {"cutmix": cutmix, "mixup": mixup, "labels_loss": labels_loss, "schedule": schedule}
