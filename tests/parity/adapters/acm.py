"""Adaptive computation modules against the arrays of `acm`: learners of every k and their two gradients, gate labels,
gates, and the losses of the end-to-end phase."""

from __future__ import annotations

import torch

from parity.case import Case
from stillhouse.methods.compression.acm.modules import (
    Gate,
    Learners,
    budget_fraction,
    budget_loss,
    diversity_loss,
    entropy_loss,
    gate_labels,
    learner_loss,
    relative_errors,
)


def learners(case: Case) -> None:
    p = case.params
    module = Learners(p["hidden_dim"], p["block_dim"], p["num_blocks"], p["activation"])
    case.load(module)
    for mode in ("no_detach", "detach"):
        if f"loss_{mode}" not in case:
            continue
        module.zero_grad()
        outputs = module.all(case["x"], detached=mode == "detach")
        loss = learner_loss(outputs, case["target"])
        loss.backward()
        case.close("outputs", outputs, rtol=1e-4, atol=1e-5)
        case.close(f"loss_{mode}", loss, rtol=1e-4)
        for name, parameter in module.named_parameters():
            case.close_grad(name, parameter, array=f"grad_{mode}:{name}", rtol=1e-4)
    for k in range(p["num_blocks"] + 1):
        torch.testing.assert_close(module.first(case["x"], k), outputs[..., k, :], rtol=1e-4, atol=1e-5)


def labels(case: Case) -> None:
    outputs, target = case["outputs"], case["original_output"]
    errors, relative = relative_errors(outputs, target)
    case.close("errors", errors, rtol=1e-4, atol=1e-5)
    case.close("relative", relative, rtol=1e-4, atol=1e-5)
    factor = case.params["gating_error_factor"]
    case.close("labels_official", gate_labels(outputs, target, factor, "released"))
    case.close("labels_paper", gate_labels(outputs, target, factor))


def gate(case: Case) -> None:
    p = case.params
    module = Gate(p["hidden_dim"], p["num_choices"], p["min_choice"], p["gating_hidden_dim"], p["depth"], p["tau"])
    case.load(module).eval()
    case.close("logits", module.logits(case["x"]), rtol=1e-4, atol=1e-5)
    case.close("choice_onehot", module(case["x"]))


def auxiliary_losses(case: Case) -> None:
    p = case.params
    names = sorted((n for n in case.arrays if n.startswith("gating_g")), key=lambda n: int(n.removeprefix("gating_g")))
    gates = [case.leaf(name) for name in names]
    fraction = budget_fraction(gates, case["learner_costs"].tolist())
    losses = {
        "budget": budget_loss(fraction, p["target"], p.get("budget_type", "l1")),
        "entropy": entropy_loss(gates),
        "diversity": diversity_loss(gates),
    }
    total = sum(p["weights"][name] * loss.double() for name, loss in losses.items())
    total.backward()
    case.close("budget_fraction", fraction, rtol=1e-4)
    for name, loss in losses.items():
        case.close(f"{name}_loss", loss, rtol=1e-4)
    case.close("total", total, rtol=1e-4, atol=1e-6)
    for name in names:
        case.close_grad(name, rtol=1e-4)


ADAPTERS = {"learners": learners, "gating_labels": labels, "deep_gate": gate, "auxiliary_losses": auxiliary_losses}
