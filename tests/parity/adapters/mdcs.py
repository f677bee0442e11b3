"""MDCS's losses, cosine classifier and experts, against the arrays of `mdcs`."""

from __future__ import annotations

import re

import torch
from torch import nn

from parity.case import Case
from stillhouse.methods.classification.mdcs import MDCS, CosineHead, Experts, confident
from stillhouse.models.resnet import ResNet

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def resnets(experts: int, stem: int, widths: tuple[int, ...], blocks: list[int], classes: int) -> list[nn.Module]:
    """One ResNet of each expert, with parameter-free shortcuts."""
    options = {"num_classes": classes, "shortcut": "pad"}
    return [ResNet(stem, widths, tuple(blocks), **options) for _ in range(experts)]


def loss(case: Case) -> None:
    p, targets = case.params, case["targets"]
    logits = case.leaf("logits")
    nets = resnets(len(logits), 4, (4, 4), [1, 1], logits.shape[-1])
    student = Experts(nets, "layer2", torch.zeros(1, 3, 8, 8))
    module = MDCS(student, case["counts"], p["exponents"], p["kd_weight"], p["warmup"], p["temperature"])
    terms = module.losses(logits, targets, p["epoch"])
    terms["loss"].backward()
    case.close("loss", terms["loss"], **CLOSE)
    case.close_grad("logits", **CLOSE)
    if "loss_ce_only" in case:
        case.close("loss_ce_only", module.losses(logits, targets, 0)["loss"], **CLOSE)
    if "selected" in case:
        half = len(targets) // 2
        weak = logits[:, :half] + module.priors[:, None]
        case.close("selected", confident(weak, targets[:half]).sum(1))


def cosine_head(case: Case) -> None:
    width, classes = case["w:weight"].shape
    head = case.load(CosineHead(width, classes, case.params["scale"]))
    out = head(case.leaf("features"))
    out.square().mean().backward()
    case.close("out", out, **CLOSE)
    case.close_grad("features", **CLOSE)
    case.close_grad("weight", head.weight, **CLOSE)


def experts_forward(case: Case) -> None:
    p, images = case.params, case["imgs"]
    nets = resnets(p["experts"], p["stem"], (p["stem"], p["layer2"], p["layer3"]), p["blocks"], p["classes"])
    experts = Experts(nets, "layer2", torch.zeros(1, *images.shape[1:]), p["scale"]).to(images.dtype)
    experts.load_state_dict({_ours(name): value for name, value in case.weights.items()}, strict=False)
    missing = {k for k in experts.state_dict() if not k.endswith("num_batches_tracked")}
    assert missing == {_ours(name) for name in case.weights}
    experts.eval()
    case.close("logits", experts.by_expert(images).transpose(0, 1), **CLOSE)
    case.close("output", experts(images), **CLOSE)
    case.close("feat", experts.embeddings(images).transpose(0, 1), **CLOSE)


def _ours(name: str) -> str:
    """`layer2s.0.1.conv1.weight` -> `experts.0.layer2.1.conv1.weight`, `linears.0.weight` -> `heads.0.weight`; the rest
    is shared."""
    found = re.fullmatch(r"(layer\d+)s\.(\d+)\.(.+)", name)
    if found:
        return f"experts.{found[2]}.{found[1]}.{found[3]}"
    return name.replace("linears.", "heads.") if name.startswith("linears.") else f"shared.{name}"


ADAPTERS = {"loss": loss, "cosine_head": cosine_head, "experts_forward": experts_forward}
