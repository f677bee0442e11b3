"""Quantized distillation against the arrays of `quantized_distillation`: quantised tensors, the points' gradient, the
loss, three steps, allocation, Huffman."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.case import Case
from stillhouse.methods.compression.quantized_distillation import (
    LearnedLevels,
    allocate_levels,
    huffman_bits,
    quantise_to_points,
)
from stillhouse.nn import quantise
from stillhouse.nn.quantise import UniformLevels
from stillhouse.objectives.kd import kd_loss


def uniform(case: Case) -> None:
    p = case.params
    levels, bucket = p.get("levels", 2 ** p["bits"]), p["bucket_size"]
    _, alpha, beta = quantise.scale(case["x"], bucket)
    case.close("alpha", alpha if bucket is not None else alpha[0])
    case.close("beta", beta if bucket is not None else beta[0])
    quantised = quantise.quantise_uniform(case["x"], levels, bucket)
    case.close("quantized", quantised)
    case.close("quantized", UniformLevels(levels, bucket).pack(case["x"]).unpack())


def points(case: Case) -> None:
    p = case.params
    learned = LearnedLevels(
        case["x"],
        p["num_points"],
        p["bucket_size"],
        "quantiles" if p["init"].startswith("quantile") else "uniform",
    )
    case.close("points", learned.points)
    if "points" in case:
        with torch.no_grad():
            learned.points.copy_(case["points"])
    scaled, alpha, beta = quantise.scale(case["x"], p["bucket_size"])
    case.close("indices", quantise_to_points(case["x"], learned.points, alpha, beta, scaled)[1])
    quantised = learned(case["x"])
    if "grad_output" in case:
        quantised.backward(case["grad_output"])
    case.close("quantized", quantised)
    case.close("quantized", learned.pack(case["x"]).unpack())
    case.close_grad("points", learned.points)


def loss_of(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, weight: float, mean: bool) -> Tensor:
    """The weighted sum that a recipe's `ce` and `kd` make; the released code divides the divergence by the classes
    too."""
    share = weight / student.shape[1] if mean else weight
    return share * kd_loss(student, teacher, temperature) + (1 - weight) * F.cross_entropy(student, labels)


def distill_loss(case: Case) -> None:
    p = case.params
    student, teacher, labels = case.leaf("student_logits"), case["teacher_logits"], case["labels"]
    mean = not p.get("kl_reduction", "mean").startswith("batchmean")
    loss = loss_of(student, teacher, labels, p["temperature"], p["teacher_weight"], mean)
    loss.backward()
    if "kl_mean" in case:
        case.close(
            "kl_mean",
            kd_loss(student, teacher, p["temperature"]) / p["temperature"] ** 2 / (student.shape[1] if mean else 1),
        )
    case.close("ce", F.cross_entropy(student, labels))
    case.close("loss", loss)
    case.close_grad("student_logits")


def qd_three_steps(case: Case) -> None:
    p = case.params
    layers: list[nn.Module] = []
    for name in sorted({n.partition(".")[0] for n in case.weights}, key=int):
        layers += [nn.ReLU()] * bool(layers) + [nn.Linear(*case[f"w:{name}.weight"].shape[::-1])]
    network = case.load(nn.Sequential(*layers))
    names = quantise.quantisable(network, first_and_last=not p["skip_first_and_last_tensor"])
    quantise.attach(network, {n: UniformLevels(2 ** p["bits"], p["bucket_size"]) for n in names})
    optimizer = torch.optim.SGD(
        network.parameters(),
        p["lr"],
        p["momentum"],
        nesterov=p["nesterov"],
        weight_decay=p["weight_decay"],
    )
    losses = []
    for x, teacher, labels in zip(case["x"], case["teacher_logits"], case["labels"]):
        loss = loss_of(network(x), teacher, labels, p["temperature"], p["teacher_weight"], mean=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    case.close("losses", torch.stack(losses))
    full = dict(network.named_parameters()) | {n: weight for n, (_, weight) in quantise.attached(network).items()}
    for name in case.weights:
        case.close(f"full:{name}", full[name])
    quantise.detach(network)
    for name, weight in network.named_parameters():
        case.close(f"quant:{name}", weight)


def assign(case: Case) -> None:
    p = case.params
    given = allocate_levels(case["grad_norms"].tolist(), p["initial"], bits=not p["input_is_point"])
    case.close("assigned", torch.tensor(given))


def huffman(case: Case) -> None:
    p = case.params
    levels = 2 ** p["bits"]
    counts = torch.zeros(levels, dtype=torch.long)
    for name in sorted(n for n in case.arrays if n.startswith("p") and n[1:].isdigit()):
        counts += UniformLevels(levels, p["bucket_size"]).pack(case[name]).indices.bincount(minlength=levels)
    case.close("mean_bits", torch.tensor(huffman_bits(counts.tolist()), dtype=torch.float64))


ADAPTERS = {
    "uniform": uniform,
    "points": points,
    "distill_loss": distill_loss,
    "qd_three_steps": qd_three_steps,
    "assign": assign,
    "huffman": huffman,
}
