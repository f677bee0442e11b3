"""Selection: real images instead of learned ones, by herding, k-center or chance.

paper: Herding Dynamical Weights to Learn; Active Learning for Convolutional Neural Networks: A Core-Set Approach
venue: ICML 2009; ICLR 2018
arxiv: 1708.00489
task: classification
family: dataset distillation
use when: a baseline is needed for learned sets, or a few real images must do
needs: real images with labels; features by a trained network (`features`), or pixels

Each class is selected by itself. `herding` adds, greedily, the image that brings the mean feature of the selection
nearest to that of the class; `k_center` adds the image farthest from all selected, beginning with the one nearest to
the mean; `random` draws without replacement. The originals select over all classes (k-center, for active learning) or
weigh the selection (herding); here every class gets `ipc` images of equal weight, as in the literature on data-set
distillation.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.config.specs import Teacher
from stillhouse.errors import UserError
from stillhouse.randomness import generator
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.run import Run
from stillhouse.signals import evaluating, read_logits
from stillhouse.synthetic.config import DatasetConfig
from stillhouse.synthetic.initial import embedded
from stillhouse.synthetic.product import SyntheticSet
from stillhouse.synthetic.real import RealImages
from stillhouse.synthetic.synthesis import made_by, plan


class Config(DatasetConfig):
    select: Literal["random", "herding", "k_center"] = "random"
    features: Teacher | None = Field(
        None, description="A network whose features (or logits) the images are compared by; default: their pixels."
    )


def herding(x: Tensor, count: int) -> Tensor:
    """(count,) rows of (n, D) whose running mean follows the mean of all, each once."""
    target, total = x.mean(0), torch.zeros_like(x[0])
    free = torch.ones(len(x), dtype=torch.bool, device=x.device)
    chosen = []
    for k in range(count):
        distance = (target - (total + x) / (k + 1)).square().sum(1)
        row = distance.masked_fill(~free, torch.inf).argmin()
        chosen.append(row)
        free[row], total = False, total + x[row]
    return torch.stack(chosen)


def k_center(x: Tensor, count: int) -> Tensor:
    """(count,) rows of (n, D): the one nearest to the mean, then each time the one farthest from all that are
    chosen."""
    row = (x - x.mean(0)).square().sum(1).argmin()
    chosen, distance = [row], (x - x[row]).square().sum(1)
    distance[row] = -1  # chosen rows never come again, even among duplicates
    for _ in range(count - 1):
        row = distance.argmax()
        chosen.append(row)
        distance = torch.minimum(distance, (x - x[row]).square().sum(1))
        distance[torch.stack(chosen)] = -1
    return torch.stack(chosen)


class Selection(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        teacher = (
            []
            if config.features is None or config.features.train is None
            else [Stage("teacher", "train the network of the features (stored, shared)")]
        )
        return [*teacher, *plan(run, config, "selection", f"select {config.ipc} images a class by {config.select}", 0)]

    def run(self, config: Config, run: Run) -> SyntheticSet:
        real = RealImages.load(run, config.data, config.zca)
        if config.select == "random":
            rows = real.take(config.ipc, generator(run.seed, "initial"), "images (ipc)")
        else:
            rows = self._selected(config, run, real)
        images = real.images[rows.to(real.images.device)]
        labels = torch.arange(len(real.classes)).repeat_interleave(config.ipc)
        return SyntheticSet(
            images, labels, real.classes, real.mean, real.std, True, real.whitening, made_by=made_by(config)
        )

    def _selected(self, config: Config, run: Run, real: RealImages) -> Tensor:
        least = int(real.counts.min())
        if config.ipc > least:
            raise UserError(
                f"{config.ipc} images (ipc) of each class are wanted, but '{real.classes[int(real.counts.argmin())]}' "
                f"has {least}."
            )
        rule = herding if config.select == "herding" else k_center
        if config.features is None:
            return torch.cat(
                [rows[rule(torch.from_numpy(embedded(real.images, rows, None)), config.ipc)] for rows in real.rows]
            )
        if config.zca:
            raise UserError("selection: a network of features sees normalised images; leave out zca, or features.")
        network = run.network("teacher", config.features, config.data).to(run.device)
        read = getattr(network, "embed", lambda x: read_logits(network(x)))
        with evaluating(network):
            return torch.cat(
                [rows[rule(torch.from_numpy(embedded(real.images, rows, read)), config.ipc)] for rows in real.rows]
            )
