"""AST's expert steps, perturbation, balance, initial images and unrolled loss against the arrays of `ast`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from parity.adapters.dataset_distillation_common import convnet_of
from parity.case import Case
from stillhouse.functional.matching import Flat
from stillhouse.methods.datasets.ast import (
    balance_factor,
    expert_loss,
    momentum_path,
    path_distances,
    path_weights,
    perturbed,
)
from stillhouse.synthetic.initial import by_distance, nearest_in_turn


def expert_step(case: Case) -> None:
    p, network = case.params, convnet_of(case)
    optimizer = torch.optim.SGD(network.parameters(), p["lr"], momentum=p["momentum"], weight_decay=p["weight_decay"])
    names = list(case.weights)  # in the order of the parameters
    losses = []
    for step, (x, y) in enumerate(zip(case["x"], case["y"])):
        loss = expert_loss(network, x, x, y, p["loss_decay"], p["gp_lambda"])
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for name, parameter in zip(names, network.parameters(), strict=True):
                case.close(f"grad:{name}", parameter.grad, rtol=1e-4, atol=1e-6)
        optimizer.step()
        losses.append(loss.detach())
    case.close("loss", torch.stack(losses), rtol=1e-4)
    for name, parameter in zip(names, network.parameters(), strict=True):
        case.close(f"after:{name}", parameter, rtol=1e-4)


def weight_perturb(case: Case) -> None:
    parameters, noise = _numbered(case, "p"), _numbered(case, "noise")
    for i, out in enumerate(perturbed(parameters, noise, case.params["alpha"])):
        case.close(f"out{i}", out, rtol=1e-6)


def _numbered(case: Case, prefix: str) -> list[Tensor]:
    return [case[f"{prefix}{i}"] for i in range(len(case.arrays)) if f"{prefix}{i}" in case]


def factors(case: Case) -> None:
    found = [balance_factor(e, bound) for e, bound in zip(case["start"].tolist(), case["max_start"].tolist())]
    case.close("factor:f64", torch.tensor(found, dtype=torch.float64), rtol=1e-9)


def representative_init(case: Case) -> None:
    p = case.params
    rows = by_distance(case["logits"], case["centers"])[
        : p["ipc"] // p["clusters"]
    ].T  # the published code may take an image for two centres
    expected = case["indices"].view(p["clusters"], -1)
    assert torch.equal(rows.sort(1).values, expected.sort(1).values), (
        f"{case!r}: {rows.tolist()} is not {expected.tolist()}"
    )
    if len(expected.unique()) == p["ipc"]:
        assert set(nearest_in_turn(case["logits"], case["centers"], p["ipc"]).tolist()) == set(
            expected.flatten().tolist()
        )


def distill(case: Case) -> None:
    p, trajectory = case.params, case["traj"]
    flat = Flat(convnet_of(case))
    x = case.leaf("x")
    lr = torch.tensor(p["syn_lr"], dtype=x.dtype, requires_grad=True)
    batches = [(x[rows], case["y"][rows]) for rows in (i[i >= 0] for i in case["idx"])]
    factor = (
        balance_factor(p["start_epoch"], p["max_start_epoch"], p["log_base"], p["offset"]) if p["balance_loss"] else 1.0
    )
    path = momentum_path(flat.gradient, trajectory[0], batches, lr, p["inner_momentum"], factor)
    distances = path_distances(path, trajectory[1:])
    loss = (torch.tensor(path_weights(len(distances), p["middle"]), dtype=x.dtype) * distances).sum()
    loss.backward()
    case.close("theta_end", path[-1], rtol=1e-3)
    case.close(
        "inner_ce",
        torch.stack([factor * F.cross_entropy(flat(theta, a), b) for theta, (a, b) in zip(path, batches)]),
        rtol=1e-3,
    )
    case.close("final_term", distances[-1], rtol=1e-3)
    if "middle_terms" in case:
        case.close("middle_terms", distances[:-1], rtol=1e-3)
    case.close("loss", loss, rtol=1e-3)
    case.close_grad("x", rtol=1e-3)
    case.close_grad("syn_lr", lr, rtol=1e-3)


ADAPTERS = {
    "expert_step": expert_step,
    "weight_perturb": weight_perturb,
    "balance_factor": factors,
    "representative_init": representative_init,
    "distill": distill,
    "distill_plain": distill,
}
