"""Both losses and the search of the few-shot and of the low-shot step, and the heads of a student that embeds images:
the arrays of `dho`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.case import Case
from stillhouse.methods.image_text.dho import DualHead, distillation_loss, mixture, search_mixture, supervised_loss

PARTS = ("ce_labeled", "kd_labeled", "ce_unlabeled", "kd_unlabeled")


def step(case: Case) -> None:
    p = case.params
    temperature, labels = p.get("T", 2.0), case["labels"].long()
    logits = {name: case.leaf(f"student_{name}") for name in PARTS}

    def target(name: str) -> Tensor:
        unit = F.normalize(case[f"teacher_feat_{name}"], dim=-1)
        return (p.get("teacher_scale", 100.0) * unit @ case["class_weights"] / temperature).log_softmax(-1)

    distilled = sum(distillation_loss(logits[f"kd_{n}"], target(n), temperature) for n in ("labeled", "unlabeled"))
    loss = p["ce_weight"] * supervised_loss(logits["ce_labeled"], labels) + p["kd_weight"] * distilled
    (loss + 0 * logits["ce_unlabeled"].sum()).backward()
    case.close("loss", loss, rtol=1e-4)
    for name in PARTS:
        case.close_grad(f"student_{name}", rtol=1e-4)
    if "eval_y" not in case:
        return
    ce, kd, y = case["eval_ce"], case["eval_kd"], case["eval_y"].long()
    if "best_acc" in case:
        accuracy, alpha, beta = search_mixture(ce, kd, y)
        for name, value in (("best_acc", 100 * accuracy), ("best_alpha", alpha), ("best_beta", beta)):
            case.close(name, torch.tensor(value, dtype=torch.float64))
    for name in (n for n in case.arrays if n.startswith("acc_alpha")):
        alpha, beta = (int(v) / 10 for v in name.removeprefix("acc_alpha").split("_beta"))
        right = (mixture(ce, kd, alpha, beta).argmax(-1) == y).double().mean()
        case.close(name, 100 * right)


def heads(case: Case) -> None:
    weights, features = case.weights, case.leaf("features")
    classes, width = weights["ce_head_weight"].shape
    net = DualHead(nn.Identity(), width, classes, unit_scale=float(case.params.get("kd_scale", 100)))
    assert net.kd is not None
    for head, name in ((net.ce, "ce"), (net.kd, "kd")):
        head.load_state_dict({k: weights[f"{name}_head_{k}"] for k in ("weight", "bias")})
    ce, kd = net.logits(features)
    case.close("ce_logits", ce, rtol=1e-4)
    case.close("kd_logits", kd, rtol=1e-4)
    (ce.sum() + (kd**2).mean()).backward()
    case.close_grad("features", rtol=1e-4)


ADAPTERS = {"loss_and_search_fewshot": step, "loss_semi": step, "heads_language_aware": heads}
