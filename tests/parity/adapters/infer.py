"""INFER's compensator, its budget and its mixed labels against the arrays of `infer`."""

from __future__ import annotations

import pytest
import torch

from parity.adapters.dataset_distillation_common import PIXELS, Descent, batch_norm_net
from parity.case import Case
from stillhouse.errors import UserError
from stillhouse.functional.recovery import BatchNormStatistics, clamp_to_pixels
from stillhouse.methods.datasets.infer import budget, compensation_loss, mixed
from stillhouse.synthetic.real import unnormalised
from stillhouse.synthetic.scores import soft_loss


def ufc(case: Case) -> None:
    p, x = case.params, case["x"]
    network = batch_norm_net(case.weights, x.shape[1])
    statistics = BatchNormStatistics(network)
    if p["model_index"] == 2:
        del statistics.layers[1:2]  # the released code leaves out the second layer of the third network
    u = torch.zeros(1, *x.shape[1:], dtype=x.dtype, requires_grad=True)
    descent, before, found, clear = Descent(u, p, p["iteration"]), x, [], []
    for t, shift in enumerate(case["rolls"].tolist()):
        before = x + u.detach()
        descent.step(
            compensation_loss(network, statistics, x, u, case["y"], shift, p["r_bn"], p["first_bn_multiplier"])["loss"]
        )
        for name, at in (("grad_u_step0", 0), ("grad_u_last", len(case["rolls"]) - 1)):
            if t == at:
                case.close(name, u.grad[0], rtol=1e-4, atol=1e-5 * float(u.grad.abs().max()))
        found.append(u.detach()[0].clone())
        clear.append(descent.clear[0].clone())
        if "u_steps" in case:
            u.data[0] = case["u_steps"][t]  # the next step from where the file's is, so that roundings do not add up
    if found:
        case.close("u_steps", torch.stack(found), rtol=1e-4, atol=1e-4, where=torch.stack(clear))
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
        loss = soft_loss(student, label, "kl", p["temperature"]) * (p["temperature"] ** 2 if p["T2_scaling"] else 1.0)
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
