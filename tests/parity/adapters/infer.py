"""INFER's compensator, its budget and its mixed labels against the arrays of `infer`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from parity.case import Case
from stillhouse.errors import UserError
from stillhouse.functional.recovery import BatchNormStatistics, clamp_to_pixels
from stillhouse.methods.datasets.infer import budget, compensation_loss, mixed
from stillhouse.synthetic.real import unnormalised
from stillhouse.synthetic.scores import soft_loss

PIXELS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


def batch_norm_net(weights: dict[str, torch.Tensor], channels: int) -> nn.Module:
    """[convolution, batch norm, ReLU, pool by 2] blocks, global pooling and a linear layer, of the sizes of its weights; frozen, in evaluation mode."""
    widths = [len(w) for name, w in weights.items() if name.endswith("weight") and w.ndim == 4]
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AvgPool2d(2)]
        channels = width
    classes = len(list(weights.values())[-1])
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


def ufc(case: Case) -> None:
    p, x = case.params, case["x"]
    network = batch_norm_net(case.weights, x.shape[1])
    statistics = BatchNormStatistics(network)
    u = torch.zeros(1, *x.shape[1:], requires_grad=True)
    optimiser = torch.optim.Adam([u], lr=p["lr"], betas=tuple(p["betas"]), eps=p["eps"])
    steps = []
    for t, shift in enumerate(case["rolls"].tolist()):
        for group in optimiser.param_groups:
            group["lr"] = p["lr"] * 0.5 * (1 + math.cos(math.pi * t / p["iteration"]))
        before = x + u.detach()
        optimiser.zero_grad()
        compensation_loss(network, statistics, x, u, case["y"], shift, p["r_bn"], p["first_bn_multiplier"])["loss"].backward()
        if t == 0:
            case.close("grad_u_step0", u.grad[0], rtol=1e-4, atol=1e-5)
        optimiser.step()
        steps.append(u.detach()[0].clone())
    case.close("grad_u_last", u.grad[0], rtol=1e-4, atol=1e-4)
    case.close("u_steps", torch.stack(steps), rtol=1e-4, atol=1e-4)
    case.close("inputs_last_before_clip", before, rtol=1e-4, atol=1e-4)
    mean, std = PIXELS[p["dataset_stats"]]
    clamp_to_pixels(before, mean, std)
    case.close("images_denorm", unnormalised(before, mean, std), rtol=1e-4, atol=1e-4)


def label_loss(case: Case) -> None:
    p, index, share = case.params, case["index"], float(case["lam:f64"])
    case.close("x_mixed", mixed(case["x"], case["x"][index], share))
    logits = case["teacher_logits_mean"]
    static = mixed(logits, logits[index], share)
    case.close("static_label", static)
    for name, label in (("static", static), ("dynamic", case["dynamic_label"])):
        student = case["student_logits"].clone().requires_grad_()
        loss = soft_loss(student, label, "kl", p["temperature"])
        loss.backward()
        case.close(f"loss_{name}", loss)
        case.close_grad(f"student_{name}", student)


def budgets(case: Case) -> None:
    for ipc, networks, classes, natural, every in case["table"].tolist():
        if natural:
            assert budget(ipc, networks, classes) == natural and natural * (networks + 1) == every
        else:
            with pytest.raises(UserError):  # the published code goes on with no image
                budget(ipc, networks, classes)


ADAPTERS = {"ufc": ufc, "label_loss": label_loss, "budget": budgets}
