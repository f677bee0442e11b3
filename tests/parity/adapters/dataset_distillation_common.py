"""The shared parts of data-set distillation against the arrays of `dataset_distillation_common`."""

from __future__ import annotations

import itertools
import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.case import Case
from stillhouse.functional.matching import Flat, trajectory_distance, unroll
from stillhouse.functional.recovery import BatchNormStatistics, clamp_to_pixels, statistics_loss, total_variation
from stillhouse.functional.siamese import GROUPS, apply, one_of, parameters
from stillhouse.functional.whitening import fit_whitening
from stillhouse.models.convnet import ConvNet
from stillhouse.synthetic.scores import augmentation_robust_score, hard_label_recovery, improvement_over_random, label_robust_score, soft_loss

NORMS = {"instancenorm": "instance", "batchnorm": "batch", "layernorm": "layer", "groupnorm": "group", "none": "none"}
PARTS = ("conv", "norm", "act", "pool")


def convnet_of(case: Case, classes: int | None = None) -> ConvNet:
    """The case's ConvNet, with its weights where it holds them."""
    p = case.params
    network = ConvNet(
        p["width"],
        p["depth"],
        NORMS[p["norm"]],
        p.get("act", "relu").replace("leakyrelu", "leaky_relu"),
        p.get("pool", "avgpooling").removesuffix("pooling"),
        classes or p["num_classes"],
        (p.get("channel", 3), p["im_size"], p["im_size"]),
    )
    if case.weights:
        step = 4 if p.get("pool", "avgpooling") != "none" else 3
        step -= p["norm"] == "none"
        network.load_state_dict({_renamed(k, step): v for k, v in case.weights.items()})
    return network


def _renamed(name: str, step: int) -> str:
    if name.startswith("classifier."):
        return name.replace("classifier", "fc")
    number, rest = re.fullmatch(r"features\.(\d+)\.(.*)", name).groups()
    return f"layer{int(number) // step + 1}.{PARTS[int(number) % step]}.{rest}"


def convnet(case: Case) -> None:
    network, x = convnet_of(case), case.leaf("x")
    logits = network(x)
    loss = F.cross_entropy(logits, case["labels"])
    loss.backward()
    case.close("feat", network.embed(x))
    case.close("logits", logits)
    case.close("ce", loss)
    case.close_grad("x")


def _drawn(case: Case, group: str, siamese: bool) -> tuple:
    size = tuple(case["x"].shape[-2:])
    values = [case[f"draw:{group}:{i}"].flatten() for i in range(case.params["ops"][group])]
    values = [v[:1] for v in values] if siamese else values
    ops = GROUPS[group]
    shares = [values[i : i + 1] for i in range(len(ops))] if len(ops) > 1 else [values]
    return tuple((op, parameters(op, tuple(share), size)) for op, share in zip(ops, shares))


def dsa(case: Case) -> None:
    siamese = case.params["siamese"]
    for group in case.params["ops"]:
        case.close(f"y:{group}", apply(case["x"], _drawn(case, group, siamese)))
    for name in case.arrays:
        if name.startswith("full_a:"):
            seed = int(name.partition(":")[2])
            draws = one_of(tuple(case.params["ops"]), 1, tuple(case["x"].shape[-2:]), seeded(seed))
            case.close(name, apply(case["x"], draws))
            case.close(f"full_b:{seed}", apply(case["x2"], draws))


def seeded(seed: int):
    """A generator for each draw, seeded one after another, as the published code does."""
    return (torch.Generator().manual_seed(seed + i) for i in itertools.count())


def zca(case: Case) -> None:
    whiten = fit_whitening(case["x"], case.params["eps"])
    y = whiten(case["x"])
    for name, value in {"y": y, "y_test": whiten(case["x_test"]), "inv": whiten.invert(y), "matrix": whiten.matrix, "mean": whiten.mean}.items():
        case.close(name, value, rtol=1e-4, atol=1e-5)


def mtt_unroll(case: Case) -> None:
    flat = Flat(convnet_of(case))
    x, lr = case.leaf("x"), torch.tensor(case.params["syn_lr"], requires_grad=True)
    batches = [(x[rows], case["y"][rows]) for rows in (i[i >= 0] for i in case["idx"])]
    end = unroll(flat.gradient, case["start"], batches, lr)
    loss = trajectory_distance(end, case["start"], case["target"])
    loss.backward()
    case.close("theta_end", end, rtol=1e-4)
    case.close("loss", loss, rtol=1e-4)
    case.close_grad("x", rtol=1e-4)
    case.close_grad("syn_lr", lr, rtol=1e-4)


def sre2l_recover(case: Case) -> None:
    p = case.params
    channels, layers = case["x0"].shape[1], []
    for width in p["widths"]:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AvgPool2d(2)]
        channels = width
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, _classes(case)))
    case.load(network).eval().requires_grad_(False)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    statistics = BatchNormStatistics(network)
    x = case["x0"].clone().requires_grad_()
    optimiser = torch.optim.Adam([x], lr=p["lr"], betas=tuple(p["betas"]), eps=p["eps"])
    found: dict[str, list[Tensor]] = {"loss": [], "ce": [], "bn": []}
    for step, shift in enumerate(case["rolls"].tolist()):
        for group in optimiser.param_groups:
            group["lr"] = p["lr"] * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / p["steps"])).item())
        rolled = torch.roll(x, shift, (2, 3))
        ce = F.cross_entropy(network(rolled), case["y"])
        distances = statistics.distances()
        bn = statistics_loss(distances, p["first_bn_multiplier"])
        if step == 0:
            case.close("r_feature", distances, rtol=1e-4)
            case.close("tv_l2", total_variation(rolled), rtol=1e-4)
        loss = ce + p["r_bn"] * bn
        optimiser.zero_grad()
        loss.backward()
        if step == 0:
            case.close_grad("x", x, rtol=1e-4)
        optimiser.step()
        clamp_to_pixels(x, mean, std)
        if step == 0:
            case.close("x_step1", x, rtol=1e-4, atol=1e-5)
        for name, value in (("loss", loss), ("ce", ce), ("bn", bn)):
            found[name].append(value.detach())
    for name, values in found.items():
        case.close(name, torch.stack(values), rtol=1e-4)
    case.close("x_final", x, rtol=1e-4, atol=1e-4)
    pixels = x.detach() * torch.tensor(std).view(1, 3, 1, 1) + torch.tensor(mean).view(1, 3, 1, 1)
    case.close("denorm", pixels.clamp(0, 1), rtol=1e-4, atol=1e-4)


def _classes(case: Case) -> int:
    """Outputs of the last layer."""
    return len(list(case.weights.values())[-1])


def ddranking_losses(case: Case) -> None:
    p = case.params
    for name, kind in (("kl", "kl"), ("sce", "sce"), ("mse_gt", "mse")):
        student = case["student"].clone().requires_grad_()
        value = soft_loss(student, case["teacher"], kind, p["temperature"], case["y"], p["mse_weight"], p["ce_weight"])
        value.backward()
        case.close(name, value)
        case.close_grad("student", student, array=f"grad:student:{name}")


def ddranking_scores(case: Case) -> None:
    real, hard, syn, random, weight = (case[f"{k}:f64"] for k in ("acc_real_hard", "acc_syn_hard", "acc_syn_any", "acc_rdm_any", "w"))
    hlr, ior = hard_label_recovery(real, hard), improvement_over_random(syn, random)
    lrs = label_robust_score(hlr, ior, weight)
    # `ars` reads the same four columns as accuracies with and without augmentation
    for name, value in {"hlr": hlr, "ior": ior, "lrs": lrs, "ars": augmentation_robust_score(real, hard, syn, random, weight)}.items():
        case.close(f"{name}:f64", value, rtol=1e-12, atol=1e-12)


ADAPTERS = {
    "convnet": convnet,
    "dsa_siamese": dsa,
    "dsa_per_sample": dsa,
    "zca": zca,
    "mtt_unroll": mtt_unroll,
    "sre2l_recover": sre2l_recover,
    "ddranking_losses": ddranking_losses,
    "ddranking_scores": ddranking_scores,
}
