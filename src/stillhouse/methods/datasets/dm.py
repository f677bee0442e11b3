"""DM: synthetic images whose mean feature in random networks is that of their class.

paper: Dataset Condensation with Distribution Matching
venue: WACV 2023
arxiv: 2110.04181
task: classification
family: dataset distillation
use when: a small set must be made fast, without bilevel training
needs: real images with labels; a network without batch statistics, such as a ConvNet with instance norm

Every iteration takes a fresh random network and sums, over classes and feature dimensions, the squared difference
between the mean feature of a real batch and that of the class's synthetic images, both under one draw of Siamese
augmentation (a draw a class). All classes go through the network together, the published code's one after another,
which is the same for networks that see each image alone; images go a few at a time. Evaluation reports the last epoch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.functional.matching import feature_mean_distance, few
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.run import Run
from stillhouse.synthetic.config import PixelConfig
from stillhouse.synthetic.product import SyntheticSet
from stillhouse.synthetic.synthesis import Synthesis, plan


class Config(PixelConfig):
    pass


def embedding(network: nn.Module, x: Tensor) -> Tensor:
    """(B, D) what a network's classifier sees. Raises `UserError` for a network without `embed`."""
    embed: Callable[[Tensor], Tensor] | None = getattr(network, "embed", None)
    if embed is None:
        raise UserError(
            f"Distribution matching reads a network's features by its `embed`, and {type(network).__name__} has none; "
            "take stillhouse:convnet."
        )
    return torch.cat([embed(part) for part in few(x)])


@torch.no_grad()
def real_embedding(network: nn.Module, real: Tensor) -> Tensor:
    """(B, D) as `embedding`, without graph."""
    return embedding(network, real)


class DistributionMatching(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        return plan(
            run,
            config,
            "dm",
            f"match mean features of {config.batch_real} real images a class in random networks",
            config.iterations,
        )

    def run(self, config: Config, run: Run) -> SyntheticSet:
        made = Synthesis(config, run)

        def loss(i: int) -> Tensor:
            network = made.network(i)
            real, synthetic = made.batches(i)
            return feature_mean_distance(real_embedding(network, real), embedding(network, synthetic), made.classes)

        made.learn("dm", loss)
        return made.product()
