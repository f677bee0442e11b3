"""PELA against the arrays of `pela`: the decomposition up to the sign of singular vectors, the losses of a small
residual network, and every gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.case import Case
from stillhouse.methods.compression.pela import feature_loss, perturbation_loss
from stillhouse.nn.attention import linear
from stillhouse.nn.low_rank import LowRank, decompose, rank_of


def lowrank(case: Case) -> None:
    p = case.params
    weight = case["weight"]
    dense = linear(weight, case["bias"] if "bias" in case else None)  # noqa: SIM401 (a case is no mapping)
    rank = rank_of(dense.in_features, dense.out_features, p["compress_ratio"])
    assert rank == p["rank"]
    low = LowRank(dense, rank)
    assert sum(x.numel() for x in dense.parameters()) == p["params_before"]
    assert sum(x.numel() for x in low.parameters()) == p["params_after"]
    values = {
        "y": dense(case["x"]),
        "y_low": low(case["x"]),
        "recovered": low.weight,
        "mse": F.mse_loss(low.weight, weight),
        "singular_values": (low.first @ low.first.T).diagonal(),
        "gram_first": low.first @ low.first.T,
        "gram_second": low.second.T @ low.second,
    }
    for name, value in values.items():
        case.close(name, value, rtol=1e-4, atol=1e-5)


class Block(nn.Module):
    """x + fc2(relu(fc1(x)))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(x)))


class Net(nn.Module):
    """Residual perceptrons and a classifier."""

    def __init__(self, width: int, inner: int, blocks: int, classes: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width, inner) for _ in range(blocks)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return self.head(x), features


def pretrain_losses(case: Case) -> None:
    p = case.params
    weights = case.under("teacher")
    inner, width = weights["blocks.0.fc1.weight"].shape
    teacher, student = (Net(width, inner, p["blocks"], len(weights["head.bias"])) for _ in range(2))
    for net in (teacher, student):
        net.to(case["x"].dtype).load_state_dict(weights)
    replaced = decompose(student, p["compress_ratio"], p["omitted"], min_outputs=1)
    student.load_state_dict(case.weights)
    logits, features = student(case["x"])
    with torch.no_grad():
        _, wanted = teacher(case["x"])
    norm = perturbation_loss([(r.layer.first, r.layer.second, r.weight) for r in replaced], p["eps"])
    norm.backward(retain_graph=True)
    for name, parameter in student.named_parameters():
        if f"gradnorm:{name}" in case:
            case.close_grad(name, parameter, array=f"gradnorm:{name}", rtol=1e-4)
    student.zero_grad()
    close, ce = feature_loss(features, wanted), F.cross_entropy(logits, case["labels"])
    total = ce + p["feature_weight"] * close + p["norm_weight"] * norm
    total.backward()
    for name, value in {"feature_loss": close, "norm_loss": norm, "ce": ce, "total": total}.items():
        case.close(name, value, rtol=1e-4)
    for name, parameter in student.named_parameters():
        case.close_grad(name, parameter, rtol=1e-4)


ADAPTERS = {"lowrank": lowrank, "pretrain_losses": pretrain_losses}
