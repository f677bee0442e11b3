"""The shared parts of data-set distillation against the arrays of `dataset_distillation_common`."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.case import Case
from stillhouse.functional.augmentation import GROUPS, apply, one_of, parameters
from stillhouse.functional.matching import Flat, trajectory_distance, unroll
from stillhouse.functional.recovery import BatchNormStatistics, clamp_to_pixels, statistics_loss, total_variation
from stillhouse.functional.whitening import fit_whitening
from stillhouse.models.convnet import ConvNet
from stillhouse.synthetic.real import unnormalised
from stillhouse.synthetic.scores import (
    augmentation_robust_score,
    hard_label_recovery,
    improvement_over_random,
    label_robust_score,
    soft_loss,
)

NORMS = {"instancenorm": "instance", "batchnorm": "batch", "layernorm": "layer", "groupnorm": "group", "none": "none"}
PIXELS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "tinyIN": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
}
"""Mean and standard deviation of pixels by the name of the data, as the published code has them."""

PARTS = ("conv", "norm", "act", "pool")


def convnet_of(case: Case) -> ConvNet:
    """The case's ConvNet for its images, with its weights where it holds them."""
    p, images = case.params, case.images
    channels, height, width = images.shape[-3:]
    network = ConvNet(
        p["width"],
        p["depth"],
        NORMS[p["norm"]],
        p.get("act", "relu").replace("leakyrelu", "leaky_relu"),
        p.get("pool", "avgpooling").removesuffix("pooling"),
        p.get("num_classes") or len(case["w:classifier.bias"]),
        (channels, height, width),
    )
    if case.weights:
        step = 4 if p.get("pool", "avgpooling") != "none" else 3
        step -= p["norm"] == "none"
        network.load_state_dict({_renamed(k, step): v for k, v in case.weights.items()})
    return network.to(images.dtype)


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
            for array, images in ((name, case["x"]), (f"full_b:{seed}", case["x2"])):
                draws = one_of(
                    tuple(case.params["ops"]), 1 if siamese else len(images), tuple(images.shape[-2:]), seeded(seed)
                )
                case.close(array, apply(images, draws))


def seeded(seed: int):
    """A generator for each draw, seeded one after another, as the published code does."""
    return (torch.Generator().manual_seed(seed + i) for i in itertools.count())


def zca(case: Case) -> None:
    whiten = fit_whitening(case["x"], case.params["eps"])
    y = whiten(case["x"])
    for name, value in {
        "y": y,
        "y_test": whiten(case["x_test"]),
        "inv": whiten.invert(y),
        "matrix": whiten.matrix,
        "mean": whiten.mean,
    }.items():
        case.close(name, value, rtol=1e-4, atol=1e-5)


def mtt_unroll(case: Case) -> None:
    flat = Flat(convnet_of(case))
    x = case.leaf("x")
    lr = torch.tensor(case.params["syn_lr"], dtype=x.dtype, requires_grad=True)
    batches = [(x[rows], case["y"][rows]) for rows in (i[i >= 0] for i in case["idx"])]
    end = unroll(flat.gradient, case["start"], batches, lr)
    loss = trajectory_distance(end, case["start"], case["target"])
    loss.backward()
    case.close("theta_end", end, rtol=1e-4)
    case.close("loss", loss, rtol=1e-4)
    case.close_grad("x", rtol=1e-4)
    case.close_grad("syn_lr", lr, rtol=1e-4)


def batch_norm_net(weights: dict[str, Tensor], channels: int) -> nn.Sequential:
    """[3x3 convolution, batch norm, ReLU, pool by 2] blocks, global pooling and a linear layer, of the sizes of its
    weights; frozen, in evaluation mode."""
    by_place = sorted(weights.items(), key=lambda item: int(item[0].partition(".")[0]))
    widths = [len(w) for _, w in by_place if w.ndim == 4]
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AvgPool2d(2)]
        channels = width
    linear = by_place[-1][1]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, len(linear))).to(
        linear.dtype
    )
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


class Descent:
    """Adam on pixels as recovery uses it, with a cosine that ends at 0; `clear` says which pixels' steps are not a
    matter of rounding.

    Adam divides a gradient by its own size, so that a pixel whose gradient is mostly rounding takes a step of any size.
    """

    def __init__(self, pixels: Tensor, params: dict[str, Any], steps: int) -> None:
        self.pixels, self.lr, self.steps, self.taken = pixels, params["lr"], steps, 0
        self.adam = torch.optim.Adam([pixels], params["lr"], tuple(params["betas"]), params["eps"])
        self.clear = torch.ones_like(pixels, dtype=torch.bool)

    def step(self, loss: Tensor) -> Tensor:
        """One step; returns the gradient."""
        for group in self.adam.param_groups:
            group["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * self.taken / self.steps))
        self.adam.zero_grad()
        loss.backward()
        gradient = self.pixels.grad.clone()
        self.clear &= gradient.abs() > 1e-3 * gradient.square().mean().sqrt()
        self.adam.step()
        self.taken += 1
        return gradient


def sre2l_recover(case: Case) -> None:
    p, x = case.params, case.leaf("x0")
    network = batch_norm_net(case.weights, x.shape[1])
    mean, std = PIXELS[p.get("clip", "imagenet").split()[0]]
    statistics, descent = BatchNormStatistics(network), Descent(x, p, p["steps"])
    found: dict[str, list[Tensor]] = {"loss": [], "ce": [], "bn": []}
    for step, shift in enumerate(case["rolls"].tolist()):
        rolled = torch.roll(x, shift, (2, 3))
        ce = F.cross_entropy(network(rolled), case["y"])
        distances = statistics.distances()
        bn, smooth, size = (
            statistics_loss(distances, p["first_bn_multiplier"]),
            total_variation(rolled),
            rolled.flatten(1).norm(dim=1).mean(),
        )
        if step == 0:
            case.close("r_feature", distances, rtol=1e-4)
            case.close("tv_l2", smooth, rtol=1e-4)
            case.close("l2", size, rtol=1e-4)
        loss = ce + p["r_bn"] * bn + p.get("tv_l2", 0.0) * smooth + p.get("l2_scale", 0.0) * size
        descent.step(loss)
        if step == 0:
            case.close_grad("x", x, rtol=1e-4)
        clamp_to_pixels(x, mean, std)
        if step == 0:
            case.close("x_step1", x, rtol=1e-4, atol=1e-5, where=descent.clear)
        for name, value in (("loss", loss), ("ce", ce), ("bn", bn)):
            found[name].append(value.detach())
    for name, values in found.items():
        case.close(name, torch.stack(values), rtol=1e-4)
    case.close("x_final", x, rtol=1e-4, atol=1e-4, where=descent.clear)
    case.close("denorm", unnormalised(x.detach(), mean, std), rtol=1e-4, atol=1e-4, where=descent.clear)


def ddranking_losses(case: Case) -> None:
    p = case.params
    for name, kind in (("kl", "kl"), ("sce", "sce"), ("mse_gt", "mse")):
        student = case["student"].clone().requires_grad_()
        factor = p["temperature"] ** 2 if p["scale_loss"] and kind != "mse" else 1.0
        value = factor * soft_loss(
            student, case["teacher"], kind, p["temperature"], case["y"], p["mse_weight"], p["ce_weight"]
        )
        value.backward()
        case.close(name, value)
        case.close_grad("student", student, array=f"grad:student:{name}")


def ddranking_scores(case: Case) -> None:
    real, hard, syn, random, weight = (
        case[f"{k}:f64"] for k in ("acc_real_hard", "acc_syn_hard", "acc_syn_any", "acc_rdm_any", "w")
    )
    hlr, ior = hard_label_recovery(real, hard), improvement_over_random(syn, random)
    lrs = label_robust_score(hlr, ior, weight)
    # `ars` reads the same four columns as accuracies with and without augmentation
    for name, value in {
        "hlr": hlr,
        "ior": ior,
        "lrs": lrs,
        "ars": augmentation_robust_score(real, hard, syn, random, weight),
    }.items():
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
