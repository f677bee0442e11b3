"""AST: trajectory matching with strong but smooth experts, and a student side that is made robust to them.

paper: Efficient Dataset Distillation through Alignment with Smooth and High-Quality Expert Trajectories
venue: arXiv 2023
arxiv: 2310.10541
task: classification
family: dataset distillation
use when: mtt is in use and better experts (momentum, weight decay) are to teach
needs: real images with labels; a network without batch statistics; expert trajectories, trained here once and shared

Experts: cross-entropy times a factor that rises to 1 over the first epochs (the code; the paper words it as clipping),
and a penalty on the input gradient, normed over channels at every pixel (the code; `penalty_norm: image` is WGAN-GP's),
in training alone. Images begin near the centres of k-means on an expert's logits. Each iteration perturbs the start's
convolutions, unrolls SGD with momentum, weighs the inner loss by the start epoch (`balance`), and also matches the
epochs in between (`middle`). `max_start` is the latest start, one less than the code's bound. Clusters are at most ipc,
and give their nearest images in turn, each image once. Without penalty, factor, momentum, balance, noise and middle
terms this is mtt. Evaluation reports the last epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.matching import Batches, Flat, Gradient, trajectory_distance
from stillhouse.functional.precision import full_precision
from stillhouse.methods.datasets import mtt
from stillhouse.randomness import generator
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.run import Run
from stillhouse.synthetic.initial import representative_rows
from stillhouse.synthetic.pools import ExpertSpec, experts
from stillhouse.synthetic.product import SyntheticSet
from stillhouse.synthetic.real import RealImages
from stillhouse.synthetic.synthesis import Synthesis, TensorState, plan

PenaltyNorm = Literal["pixel", "image"]
Middle = Literal["none", "agg", "adaptive"]
LAST = 8
"""Steps whose graph `unroll: last` keeps, as in the released code."""


class Config(mtt.Config):
    experts: ExpertSpec = Field(
        default_factory=lambda: ExpertSpec(lr=0.003, momentum=0.9, weight_decay=1e-3, drop=0.6),
        description="Published: 50 to 100 of 50 epochs.",
    )
    clip_from: float = Field(
        0.5, gt=0, le=1, description="Experts: the factor of the loss in the first epoch; 1: none."
    )
    clip_epochs: int = Field(10, ge=1, description="Experts: epochs over which that factor rises to 1.")
    penalty: float = Field(2.0, ge=0, description="Experts: weight of the input-gradient penalty; 0: none.")
    penalty_norm: PenaltyNorm = Field(
        "pixel", description="Of the input's gradient: over the channels of a pixel, or over the image."
    )
    init: Literal["noise", "real", "representative", "mix"] = Field(
        "representative", description="How the images begin."
    )
    clusters: int = Field(10, ge=1, description="representative: centres a class, at most ipc.")
    inner_momentum: float = Field(0.9, ge=0, lt=1, description="Of the inner steps.")
    balance: bool = Field(True, description="Weigh the inner loss by the start epoch.")
    middle: Middle = Field(
        "agg", description="Terms of the epochs between: none, each once (agg), or more the later (adaptive)."
    )
    perturb: float = Field(1.0, ge=0, description="Noise on the convolutions of the start, relative; 0: none.")
    unroll: Literal["full", "last"] = Field(  # type: ignore[assignment]
        "full", description="last: the graph of the last 8 inner steps alone."
    )

    @model_validator(mode="after")
    def _epochs_have_steps(self) -> Config:
        if self.inner_steps < self.expert_epochs:
            raise ValueError(
                f"inner_steps {self.inner_steps} is less than expert_epochs {self.expert_epochs}; an epoch needs a "
                "step or more"
            )
        return self


# ---- experts ---------------------------------------------------------------------------------------------------------


def loss_factor(epoch: int, start: float = 0.5, epochs: int = 10) -> float:
    """Of the cross-entropy in an epoch (from 0): from `start` in equal steps to 1 at `epochs`."""
    return min(1.0, start + (1 - start) * epoch / epochs)


def gradient_penalty(network: nn.Module, x: Tensor, norm: PenaltyNorm = "pixel") -> Tensor:
    """Mean of (|d sum(logits) / dx| - 1)^2 over images (B, C, H, W) and pixels, with graph; the norm is over channels,
    or over all of an image."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    squares = gradient.float().square().sum(1 if norm == "pixel" else (1, 2, 3))
    return ((squares + 1e-12).sqrt() - 1).square().mean()


def expert_loss(
    network: nn.Module,
    x: Tensor,
    augmented: Tensor,
    labels: Tensor,
    factor: float = 1.0,
    penalty: float = 2.0,
    norm: PenaltyNorm = "pixel",
) -> Tensor:
    """factor * CE(augmented) + penalty * `gradient_penalty`(x), a scalar."""
    loss = factor * F.cross_entropy(network(augmented), labels)
    return loss + penalty * gradient_penalty(network, x, norm) if penalty else loss


# ---- matching --------------------------------------------------------------------------------------------------------


def perturbed(parameters: Sequence[Tensor], noise: Sequence[Tensor], alpha: float = 1.0) -> list[Tensor]:
    """p + alpha * d / |d|_F * p for the 4-D parameters (convolutions), with d the noise of each, in order; others as
    they are."""
    left = iter(noise)
    return [p + alpha * _unit(next(left)) * p if p.ndim == 4 else p for p in parameters]


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x)


def balance_factor(start: int, bound: int, base: float = 5.0, offset: float = 8.0) -> float:
    """Of the inner loss from a start epoch below `bound`: log_5(e - bound // 2 + 8) in the later half, 1 / log_5(bound
    // 2 - e + 8) before it."""
    half = bound // 2
    return math.log(start - half + offset, base) if start >= half else 1 / math.log(half - start + offset, base)


def momentum_path(
    gradient: Gradient,
    start: Tensor,
    batches: Batches,
    lr: Tensor,
    momentum: float = 0.9,
    factor: float = 1.0,
    last: int | None = None,
) -> list[Tensor]:
    """[theta_0, …, theta_N], each (P,): b_k = momentum b_{k-1} + factor g(theta_k), theta_{k+1} = theta_k - lr b_k,
    with the graph of every step.

    Args:
        gradient: such as `Flat.gradient`.
        lr: scalar, possibly learned.
        last: keep the graph of so many steps at the end alone.
    """
    batches = list(batches)
    path, velocity = [start.detach().requires_grad_()], torch.zeros_like(start)
    for k, (x, labels) in enumerate(batches):
        if last is not None and k <= len(batches) - last:
            path[-1], velocity = path[-1].detach().requires_grad_(), velocity.detach()
        velocity = momentum * velocity + factor * gradient(path[-1], x, labels)
        path.append(path[-1] - lr * velocity)
    return path


@full_precision
def path_distances(path: list[Tensor], targets: Tensor) -> Tensor:
    """(M,): after step floor(N / M) j the distance to targets[j - 1], and at the end that to the last, each relative to
    the distance of path[0] from it.

    Args:
        path: theta_0 … theta_N, each (P,).
        targets: the expert's next M epochs (M, P).
    """
    start, every = path[0].detach(), (len(path) - 1) // len(targets)
    at = [*(every * j for j in range(1, len(targets))), len(path) - 1]
    return torch.stack([trajectory_distance(path[k], start, target) for k, target in zip(at, targets)])


def path_weights(epochs: int, middle: Middle) -> list[float]:
    """Of the M distances: the last 1; those between 0 (none), 1 (agg) or j / M (adaptive)."""
    return [{"none": 0.0, "agg": 1.0, "adaptive": j / epochs}[middle] for j in range(1, epochs)] + [1.0]


class SmoothExpertAlignment(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        e = config.experts
        does = f"match {config.inner_steps} steps with momentum to {config.expert_epochs} epochs of a smooth expert"
        return [
            Stage(
                "expert",
                f"train {e.count} smooth experts for {e.epochs} epochs (stored, shared)",
                {"network": config.network.model},
            ),
            *plan(run, config, "ast", does, config.iterations),
        ]

    def run(self, config: Config, run: Run) -> SyntheticSet:
        near_centres = config.init == "representative"
        made = Synthesis(config.model_copy(update={"init": "real"}) if near_centres else config, run)
        made.config = config
        if not config.iterations and not near_centres:
            return made.product()
        device = made.images.device
        network = run.model(config.network, config.data, role="expert").to(device)
        flat, paths = Flat(network), smooth_experts(config, run, made.real)
        if near_centres:
            flat.load(paths[int(torch.randint(len(paths), (1,), generator=made.generator("expert")))][-1].to(device))
            rows = representative_rows(made.real, config.ipc, generator(run.seed, "initial"), network, config.clusters)
            made.images.data.copy_(made.real.images[rows.to(device)])
        if not config.iterations:
            return made.product()
        lr = nn.Parameter(torch.tensor(config.inner_lr, device=device))
        groups: list[dict[str, Any]] = [
            {"params": [made.images], "lr": config.lr},
            {"params": [lr], "lr": config.lr_lr},
        ]
        optimizer = torch.optim.SGD(groups, momentum=config.momentum)
        weights = torch.tensor(path_weights(config.expert_epochs, config.middle), device=device)

        def loss(i: int) -> dict[str, Tensor]:
            drawn = made.generator("start", i)
            trajectory = paths[int(torch.randint(len(paths), (1,), generator=drawn))]
            epoch = int(torch.randint(config.max_start + 1, (1,), generator=drawn))
            start = trajectory[epoch].to(device)
            if config.perturb:
                parameters = list(flat.unflatten(start).values())
                noise = [torch.randn(p.shape, generator=drawn).to(device) for p in parameters if p.ndim == 4]
                start = torch.cat([p.flatten() for p in perturbed(parameters, noise, config.perturb)])
            factor = balance_factor(epoch, config.max_start + 1) if config.balance else 1.0
            last = LAST if config.unroll == "last" else None
            path = momentum_path(
                flat.gradient, start, mtt.inner_batches(made, config, i), lr, config.inner_momentum, factor, last
            )
            distances = path_distances(path, trajectory[epoch + 1 : epoch + config.expert_epochs + 1].to(device))
            return {"loss": (weights * distances).sum(), "final": distances[-1], "inner_lr": lr.detach().clone()}

        def after(i: int) -> None:
            with torch.no_grad():
                lr.clamp_(min=1e-6)

        made.learn("ast", loss, optimizer=optimizer, extra={"inner_lr": TensorState(lr)}, after=after)
        made.figures |= {"inner_lr": lr.item(), "expert_step": mean_step(paths)}
        return made.product(lr=lr.item())


def smooth_experts(config: Config, run: Run, real: RealImages) -> list[Tensor]:
    """The experts' trajectories, each (epochs + 1, P). Raises `UserError` where one stands still over an epoch."""

    def loss(network: nn.Module, x: Tensor, augmented: Tensor, labels: Tensor, epoch: int) -> Tensor:
        factor = loss_factor(epoch, config.clip_from, config.clip_epochs)
        return expert_loss(network, x, augmented, labels, factor, config.penalty, config.penalty_norm)

    smooth = config.model_dump(include={"clip_from", "clip_epochs", "penalty", "penalty_norm"})
    paths = experts(run, config.network, config.data, real, config.experts, config.augment, loss, {"smooth": smooth})
    if any(bool((path.diff(dim=0) == 0).all(1).any()) for path in paths):
        raise UserError("ast: an expert did not move in an epoch; raise experts.lr.")
    return paths


def mean_step(paths: Sequence[Tensor]) -> float:
    """The mean |theta_{e+1} - theta_e| over epochs and experts: small where they are smooth."""
    return float(torch.stack([path.diff(dim=0).norm(dim=1).mean() for path in paths]).mean())
