"""Adapters take other cases of their kinds: shapes, options and weights that no file has, their truth written from the
cards in plain torch."""

from __future__ import annotations

import importlib
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.case import Case

Check = Callable[..., None]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Write a file (`__` in a name stands for the colon) and run it through its adapter; one with the array `spoils`
    made wrong must fail."""

    def run(slug: str, kind: str, params: dict[str, Any], spoils: str, **arrays: Any) -> None:
        held = {
            k.replace("__", ":"): v.detach().numpy() if isinstance(v, Tensor) else np.asarray(v)
            for k, v in arrays.items()
        }
        adapter = importlib.import_module(f"parity.adapters.{slug}").ADAPTERS[kind]
        path = tmp_path / slug / "other.npz"
        path.parent.mkdir(exist_ok=True)
        for wrong in (False, True):
            if wrong:
                held[spoils] = held[spoils] + held[spoils].dtype.type(1)
            np.savez(path, kind=kind, params=json.dumps(params), **held)
            if not wrong:
                adapter(Case(path))
            else:
                with pytest.raises(AssertionError):
                    adapter(Case(path))

    return run


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def convnet(
    channels: int,
    width: int,
    depth: int,
    side: tuple[int, int],
    classes: int,
    norm: Callable[[int], nn.Module],
    pool: nn.Module,
) -> nn.Module:
    """The published ConvNet, with its names of weights."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(depth):
        padding = 3 if i == 0 and channels == 1 else 1
        layers += [nn.Conv2d(width if i else channels, width, 3, padding=padding), norm(width), nn.ReLU(), pool]
    features = nn.Sequential(*layers)
    network = nn.Module()
    network.features, network.classifier = (
        features,
        nn.Linear(features(torch.zeros(1, channels, *side)).numel(), classes),
    )
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return network


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {f"w:{k}": v.clone() for k, v in network.state_dict().items()}


def instance(width: int) -> nn.Module:
    return nn.GroupNorm(width, width)


@pytest.mark.parametrize(
    ("channels", "side", "norm", "norms", "pool", "dtype"),
    [
        (1, (28, 28), instance, "instancenorm", "avg", torch.float32),
        (3, (12, 20), lambda w: nn.GroupNorm(4, w), "groupnorm", "max", torch.float32),
        (4, (8, 8), nn.BatchNorm2d, "batchnorm", "avg", torch.float64),
    ],
    ids=["grey 28 px", "not square", "float64"],
)
def test_a_convnet_of_any_image(check: Check, channels, side, norm, norms, pool, dtype) -> None:
    network = convnet(channels, 8, 2, side, 5, norm, {"avg": nn.AvgPool2d(2), "max": nn.MaxPool2d(2)}[pool]).to(dtype)
    held, x, labels = weights(network), leaf(normal(3, channels, *side, dtype=dtype)), torch.tensor([0, 4, 2])
    embedded = network.features(x).flatten(1)
    logits = network.classifier(embedded)
    ce = F.cross_entropy(logits, labels)
    ce.backward()
    params = {
        "channel": channels,
        "num_classes": 5,
        "width": 8,
        "depth": 2,
        "act": "relu",
        "norm": norms,
        "pool": f"{pool}pooling",
        "im_size": side[0],
    }
    arrays = {"x": x, "labels": labels, "feat": embedded, "logits": logits, "ce": ce, "grad:x": x.grad, **held}
    check("dataset_distillation_common", "convnet", params, "logits", **arrays)


def test_losses_of_dd_ranking_with_their_scale(check: Check) -> None:
    student, teacher, labels, t = 2 * normal(5, 7), 2 * normal(5, 7, seed=1), torch.tensor([0, 3, 6, 2, 2]), 3.0
    q = (teacher / t).softmax(1)
    found = {}
    losses = {
        "kl": lambda s: t * t * (q * (q.log() - (s / t).log_softmax(1))).sum(1).mean(),
        "sce": lambda s: -t * t * (q * (s / t).log_softmax(1)).sum(1).mean(),
        "mse_gt": lambda s: 0.5 * (s - teacher).square().mean() + 2.0 * F.cross_entropy(s, labels),
    }
    for name, loss in losses.items():
        s = leaf(student)
        value = loss(s)
        value.backward()
        found |= {name: value, f"grad:student:{name}": s.grad}
    params = {"temperature": t, "scale_loss": True, "mse_weight": 0.5, "ce_weight": 2.0}
    check(
        "dataset_distillation_common",
        "ddranking_losses",
        params,
        "kl",
        student=student,
        teacher=teacher,
        y=labels,
        **found,
    )


def batch_norm_net(widths: list[int], classes: int) -> nn.Sequential:
    torch.manual_seed(1)
    blocks = [
        m
        for a, b in itertools.pairwise([3, *widths])
        for m in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.AvgPool2d(2))
    ]
    network = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))
    for m in network:
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, 0, 0.3)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return network.eval().requires_grad_(False)


def recovery(
    x: Tensor,
    images: Tensor,
    network: nn.Sequential,
    loss: Callable[[Tensor, Tensor, list[Tensor]], Tensor],
    rolls: list[list[int]],
    lr: float,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(value, gradient) of x after each step of Adam with a cosine; `loss` gets images + x, rolled, its logits and the
    distances of batch norm."""
    adam = torch.optim.Adam([x], lr, (0.5, 0.9))
    for step, shift in enumerate(rolls):
        adam.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / len(rolls)))
        seen = h = torch.roll(images + x, shift, (2, 3))
        distances = []
        for m in network:
            if isinstance(m, nn.BatchNorm2d):
                distances.append(
                    (m.running_mean - h.mean((0, 2, 3))).norm()
                    + (m.running_var - h.var((0, 2, 3), unbiased=False)).norm()
                )
            h = m(h)
        adam.zero_grad()
        loss(seen, h, distances).backward()
        adam.step()
        yield x.detach().clone(), x.grad.clone()


TINY = torch.tensor([[0.4802, 0.4481, 0.3975], [0.2302, 0.2265, 0.2262]]).view(2, 1, 3, 1, 1)
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
ADAM = {"lr": 0.1, "betas": [0.5, 0.9], "eps": 1e-8, "first_bn_multiplier": 10.0, "r_bn": 0.5}


def test_a_compensator_of_the_third_network_leaves_out_its_second_layer(check: Check) -> None:
    network, natural, labels, rolls = (
        batch_norm_net([6, 8, 9], 5),
        normal(5, 3, 16, 16),
        torch.arange(5),
        [[1, 0], [3, 2], [0, 4]],
    )

    def loss(_: Tensor, logits: Tensor, r: list[Tensor]) -> Tensor:
        return F.cross_entropy(logits, labels) + 0.5 * (10 * r[0] + r[2])

    steps, gradients = zip(*recovery(torch.zeros(1, 3, 16, 16, requires_grad=True), natural, network, loss, rolls, 0.1))
    last = natural + steps[1]
    arrays = {
        "x": natural,
        "y": labels,
        "rolls": np.array(rolls),
        "u_steps": torch.cat(steps),
        "inputs_last_before_clip": last,
        **weights(network),
    }
    arrays |= {
        "grad_u_step0": gradients[0][0],
        "grad_u_last": gradients[2][0],
        "images_denorm": (last * TINY[1] + TINY[0]).clamp(0, 1),
    }
    check("infer", "ufc", {**ADAM, "iteration": 3, "model_index": 2, "dataset_stats": "tinyIN"}, "u_steps", **arrays)


def test_a_recovery_with_smoothness_and_size_and_weights_in_any_order(check: Check) -> None:
    network, start, labels, rolls = (
        batch_norm_net([5, 6, 7], 4),
        normal(4, 3, 12, 16),
        torch.arange(4),
        [[2, 1], [0, 3]],
    )
    low, high = -IMAGENET[0] / IMAGENET[1], (1 - IMAGENET[0]) / IMAGENET[1]
    x, found = leaf(start), {"loss": [], "ce": [], "bn": []}

    def smooth(s: Tensor) -> Tensor:
        across = (
            s[..., 1:] - s[..., :-1],
            s[..., 1:, :] - s[..., :-1, :],
            s[..., 1:, 1:] - s[..., :-1, :-1],
            s[..., 1:, :-1] - s[..., :-1, 1:],
        )
        return sum(d.norm() for d in across)

    first = {}

    def loss(seen: Tensor, logits: Tensor, r: list[Tensor]) -> Tensor:
        ce, bn, size = F.cross_entropy(logits, labels), 10 * r[0] + r[1] + r[2], seen.flatten(1).norm(dim=1).mean()
        (
            first.setdefault("r_feature", torch.stack(r)),
            first.setdefault("tv_l2", smooth(seen)),
            first.setdefault("l2", size),
        )
        value = ce + 0.5 * bn + 0.01 * smooth(seen) + 0.02 * size
        for name, part in (("loss", value), ("ce", ce), ("bn", bn)):
            found[name].append(part.detach())
        return value

    for _, gradient in recovery(x, torch.zeros(()), network, loss, rolls, 0.1):
        x.data.clamp_(low, high)
        first.setdefault("grad:x", gradient), first.setdefault("x_step1", x.detach().clone())
    arrays = {
        "x0": start,
        "y": labels,
        "rolls": np.array(rolls),
        "x_final": x,
        "denorm": x * IMAGENET[1] + IMAGENET[0],
        **first,
    }
    arrays |= {k: torch.stack(v) for k, v in found.items()} | dict(sorted(weights(network).items()))
    check(
        "dataset_distillation_common",
        "sre2l_recover",
        {**ADAM, "steps": 2, "tv_l2": 0.01, "l2_scale": 0.02},
        "bn",
        **arrays,
    )


@pytest.mark.parametrize(("voter", "weight"), [("equal", [0.5, 0.5]), ("random", [0.3, 0.7])])
def test_a_committee_of_any_vote(check: Check, voter: str, weight: list[float]) -> None:
    networks, start, labels = [batch_norm_net([5, 6], 3), batch_norm_net([4], 3)], normal(3, 3, 8, 8), torch.arange(3)
    x, total = leaf(start), torch.zeros(())
    for network, share in zip(networks, weight):
        h = x
        for i, m in enumerate(network):
            if isinstance(m, nn.BatchNorm2d):
                r = (m.running_mean - h.mean((0, 2, 3))).norm() + (
                    m.running_var - h.var((0, 2, 3), unbiased=False)
                ).norm()
                total = total + share * 0.5 * (10 if i == 1 else 1) * r
            h = m(h)
        total = total + share * F.cross_entropy(h, labels)
    total.backward()
    stepped = (start - 0.1 * x.grad.sign()).clamp(
        -IMAGENET[0] / IMAGENET[1], (1 - IMAGENET[0]) / IMAGENET[1]
    )  # Adam's first step
    params = {
        **ADAM,
        "names": ["a", "b"],
        "prior": {"a": 60, "b": 90},
        "weight_temperature": 5,
        "voter": voter,
        "iteration": 1,
    }
    arrays = {
        "x0": start,
        "y": labels,
        "rolls": np.zeros((1, 2), int),
        "grad_step0": x.grad,
        "grad_last": x.grad,
        "weights:f64": np.array(weight),
    }
    arrays |= {f"w:{i}:{k}": v for i, network in enumerate(networks) for k, v in network.state_dict().items()}
    params |= {"mean": IMAGENET[0].flatten().tolist(), "std": IMAGENET[1].flatten().tolist()}
    check(
        "cv_dd", "committee_recover", params, "grad_last", x_final_denorm=stepped * IMAGENET[1] + IMAGENET[0], **arrays
    )


def test_an_unrolled_training_of_grey_images_whose_channels_nothing_names(check: Check) -> None:
    network = convnet(1, 6, 2, (28, 28), 3, instance, nn.AvgPool2d(2))
    shapes = {k: p.shape for k, p in network.named_parameters()}
    start = torch.cat([p.detach().flatten() for p in network.parameters()])
    target, x, y, idx = (
        start + 0.05 * normal(len(start)),
        leaf(normal(3, 1, 28, 28)),
        torch.arange(3),
        torch.tensor([[2, 0], [1, -1], [0, 2]]),
    )
    network.forward = lambda images: network.classifier(network.features(images).flatten(1))
    lr, theta = torch.tensor(0.1, requires_grad=True), start.clone().requires_grad_()
    for rows in idx:
        rows = rows[rows >= 0]
        named = {
            k: part.view(s) for (k, s), part in zip(shapes.items(), theta.split([s.numel() for s in shapes.values()]))
        }
        ce = F.cross_entropy(torch.func.functional_call(network, named, (x[rows],)), y[rows])
        theta = theta - lr * torch.autograd.grad(ce, theta, create_graph=True)[0]
    loss = (theta - target).square().sum() / (start - target).square().sum()
    loss.backward()
    params = {
        "num_classes": 3,
        "ipc": 1,
        "width": 6,
        "depth": 2,
        "norm": "instancenorm",
        "im_size": 28,
        "syn_lr": 0.1,
        "steps": 3,
        "batch_syn": 2,
    }
    arrays = {
        "x": x,
        "y": y,
        "start": start,
        "target": target,
        "idx": idx,
        "theta_end": theta,
        "loss": loss,
        "grad:x": x.grad,
        "grad:syn_lr": lr.grad,
    }
    check("dataset_distillation_common", "mtt_unroll", params, "theta_end", **arrays)


@pytest.mark.parametrize(("size", "factor", "bound"), [(9, 3, 40), (7, 2, 9), (8, 3, 60)])
def test_tiles_of_any_factor_where_sides_do_not_divide(check: Check, size: int, factor: int, bound: int) -> None:
    x, y = normal(4, 3, size, size), torch.tensor([3, 1, 1, 0])

    def cut(rows: slice, by: int) -> tuple[Tensor, Tensor]:
        side = math.ceil(size / by)
        padded = F.pad(x[rows], (0, side * by - size) * 2, value=0.5)
        tiles = torch.cat(
            [padded[..., i * side : (i + 1) * side, j * side : (j + 1) * side] for i in range(by) for j in range(by)]
        )
        return F.interpolate(tiles, size=(size, size), mode="bilinear"), y[rows].repeat(by * by)

    taken, parts = 0, []
    for by in range(factor, 0, -1):
        used = sum(len(a) for a, _ in parts)
        count = min((bound - used - (4 - taken)) // by**2, 4 - taken) if by > 1 else 4 - taken
        parts.append(cut(slice(taken, taken + count), by))
        taken += count
        if taken == 4:
            break
    ways = {
        "single": [cut(slice(None), factor)],
        "multi": [cut(slice(None), by) for by in range(1, factor + 1)],
        "bound": parts,
    }
    arrays = {k: torch.cat([a for a, _ in v]) for k, v in ways.items()} | {
        f"{k}_y": torch.cat([b for _, b in v]) for k, v in ways.items()
    }
    check("ncfm", "decode", {"factor": factor, "bound": bound}, "bound", x=x, y=y, **arrays)
    samples = normal(2, 2 * factor**2, 3, size, size)
    sides = [size // factor + (i < size % factor) for i in range(factor)]
    edges = [0, *itertools.accumulate(sides)]
    data = torch.zeros(4, 3, size, size)
    for c, i, j in itertools.product(range(2), range(factor), range(factor)):
        small = F.interpolate(samples[c, 2 * (i * factor + j) :][:2], size=(sides[i], sides[j]))
        data[2 * c : 2 * c + 2, :, edges[i] : edges[i + 1], edges[j] : edges[j + 1]] = small
    params = {"ipc": 2, "classes": 2, "factor": factor}
    check("ncfm", "mix_init", params, "data", samples=samples, data=data, targets=torch.tensor([0, 0, 1, 1]))


def test_two_centres_may_share_an_image(check: Check) -> None:
    logits, centres = normal(12, 4), 0.1 * normal(3, 4, seed=1)
    nearest = torch.stack([(logits - c).norm(dim=1).argsort()[:4] for c in centres])
    assert len(nearest.unique()) < 12
    check(
        "ast",
        "representative_init",
        {"clusters": 3, "ipc": 12},
        "indices",
        logits=logits,
        centers=centres,
        indices=nearest.flatten(),
    )


def test_the_weight_of_reconstruction_stays_out_of_it(check: Check) -> None:
    views, scores, stat, noise, proj = (
        normal(2, 3, 1, 4, 4),
        normal(2, 3, 4),
        normal(3, 4),
        normal(3, 2, seed=1),
        normal(2, 2, 16, seed=2),
    )
    masked = views.clone()
    for v, b in itertools.product(range(2), range(3)):
        for k in scores[v, b].argsort()[:2].tolist():
            masked[v, b, :, k // 2 * 2 : k // 2 * 2 + 2, k % 2 * 2 : k % 2 * 2 + 2] = 0
    both = leaf(stat)
    mean, log_variance = both.chunk(2, 1)
    z = mean + (log_variance / 2).exp() * noise
    recon = sum((views[v].flatten(1) - z @ proj[v]).square().sum() for v in range(2))
    kld = 0.3 * -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean()
    (0.5 * recon + kld).backward()
    params = {"alpha": 0.5, "kld_weight": 0.3, "mask_ratio": 0.5, "patch": 2}
    arrays = {"Xs": views, "scores": scores, "masked": masked, "stat": stat, "eps": noise, "z": z, "proj": proj}
    check(
        "mrdd",
        "consistency",
        params,
        "recon_loss",
        loss=0.5 * recon + kld,
        recon_loss=recon,
        kld_loss=kld,
        grad__stat=both.grad,
        **arrays,
    )
