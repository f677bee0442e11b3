"""MTT: training on the synthetic images for a few steps leads where experts got in whole epochs of real training.

paper: Dataset Distillation by Matching Training Trajectories
venue: CVPR 2022
arxiv: 2203.11932
task: classification
family: dataset distillation
use when: accuracy matters more than the time and memory of making the set
needs: real images with labels; a network without batch statistics; expert trajectories, trained here once and shared

Experts are trained with SGD and their parameters stored after every epoch. Each iteration picks an expert and a start
epoch e <= max_start, takes inner_steps steps of SGD from there on augmented synthetic batches with a learned rate, and
compares where it arrives with the expert M epochs later, relative to the way the expert went. The gradient goes through
all steps (`unroll: full`); `unroll: steps` treats the inner parameters as constants step by step, with the memory of a
single step (the variant of FYI's code). The pixels' and the rate's optimisers are SGD with momentum 0.5; the rate is
kept above 1e-6. With `mirror` inner batches are halved and doubled by their mirror images. Evaluation trains with the
learned rate and reports the last epoch.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.functional.augmentation import apply
from stillhouse.functional.matching import Flat, trajectory_distance, trajectory_distance_by_steps, unroll
from stillhouse.randomness import permutation
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.run import Run
from stillhouse.synthetic.config import PixelConfig
from stillhouse.synthetic.pools import ExpertSpec, experts
from stillhouse.synthetic.product import SyntheticSet
from stillhouse.synthetic.synthesis import Synthesis, TensorState, plan
from stillhouse.synthetic.training import augmentation


class Config(PixelConfig):
    experts: ExpertSpec = Field(default_factory=ExpertSpec)
    lr: float = Field(1000.0, gt=0, description="Of the pixels: SGD.")
    expert_epochs: int = Field(2, ge=1, description="M: epochs between start and target.")
    max_start: int = Field(5, ge=0, description="The latest start epoch.")
    inner_steps: int = Field(20, ge=1, description="N: steps on synthetic images.")
    batch_syn: int | None = Field(None, ge=1, description="Synthetic images of an inner step; default: all.")
    inner_lr: float = Field(0.01, gt=0, description="Where the learned rate of the inner steps begins.")
    lr_lr: float = Field(1e-5, ge=0, description="Of that rate: SGD.")
    unroll: Literal["full", "steps"] = Field(
        "full", description="steps: inner parameters as constants, with the memory of one step."
    )

    @model_validator(mode="after")
    def _target_exists(self) -> Config:
        if self.max_start + self.expert_epochs > self.experts.epochs:
            raise ValueError(
                f"the latest start {self.max_start} and expert_epochs {self.expert_epochs} go beyond the experts' "
                f"{self.experts.epochs} epochs"
            )
        return self


class TrajectoryMatching(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        e = config.experts
        does = f"match {config.inner_steps} steps on synthetic images to {config.expert_epochs} epochs of an expert"
        return [
            Stage(
                "expert",
                f"train {e.count} experts for {e.epochs} epochs (stored, shared)",
                {"network": config.network.model},
            ),
            *plan(run, config, "mtt", does, config.iterations),
        ]

    def run(self, config: Config, run: Run) -> SyntheticSet:
        made = Synthesis(config, run)
        if not config.iterations:
            return made.product()
        flat = Flat(run.model(config.network, config.data, role="expert").to(made.images.device))
        paths = experts(run, config.network, config.data, made.real, config.experts, config.augment)
        lr = nn.Parameter(torch.tensor(config.inner_lr, device=made.images.device))
        groups: list[dict[str, Any]] = [
            {"params": [made.images], "lr": config.lr},
            {"params": [lr], "lr": config.lr_lr},
        ]
        optimizer = torch.optim.SGD(groups, momentum=config.momentum)

        def loss(i: int) -> dict[str, Tensor]:
            drawn = made.generator("start", i)
            path = paths[int(torch.randint(len(paths), (1,), generator=drawn))]
            epoch = int(torch.randint(config.max_start + 1, (1,), generator=drawn))
            start, target = (path[e].to(made.images.device) for e in (epoch, epoch + config.expert_epochs))
            if torch.equal(path[epoch], path[epoch + config.expert_epochs]):
                raise UserError(
                    f"mtt: an expert did not move between epochs {epoch} and {epoch + config.expert_epochs}; raise "
                    "experts.lr."
                )
            batches = inner_batches(made, config, i)
            if config.unroll == "steps":
                value = trajectory_distance_by_steps(flat.gradient, start, target, batches, lr)
            else:
                value = trajectory_distance(unroll(flat.gradient, start, batches, lr), start, target)
            return {"loss": value, "inner_lr": lr.detach().clone()}

        def after(i: int) -> None:
            with torch.no_grad():
                lr.clamp_(min=1e-6)

        made.learn("mtt", loss, optimizer=optimizer, extra={"inner_lr": TensorState(lr)}, after=after)
        made.figures["inner_lr"] = lr.item()
        return made.product(lr=lr.item())


def inner_batches(made: Synthesis, config: Config, i: int) -> list[tuple[Tensor, Tensor]]:
    """The augmented batches of iteration i's inner steps: permutations of the synthetic images in chunks, with gradient
    to the pixels."""
    count = len(made.images)
    size = min(config.batch_syn or count, count)
    if config.mirror:
        size = max(1, size // 2)
    chunks: list[Tensor] = []
    while len(chunks) < config.inner_steps:
        order = torch.tensor(permutation(count, made.run.seed, "inner", i, len(chunks)), device=made.images.device)
        chunks += order.split(size)
    drawn, batches = made.generator("augment", i), []
    for rows in chunks[: config.inner_steps]:
        x, y = made.images[rows], made.labels[rows]
        if config.mirror:
            x, y = torch.cat([x, x.flip(-1)]), y.repeat(2)
        batches.append((apply(x, augmentation(config.augment, len(x), made.size, drawn)), y))
    return batches
