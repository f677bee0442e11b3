"""DSA: synthetic images whose gradients in a network in training are those of real images, under one draw of Siamese
augmentation.

paper: Dataset Condensation with Differentiable Siamese Augmentation
venue: ICML 2021
arxiv: 2102.08259
task: classification
family: dataset distillation
use when: gradient matching is the baseline asked for (without augmentation it is DC, arXiv 2006.05929); DM is faster
needs: real images with labels; a network without batch statistics, such as a ConvNet with instance norm

Each iteration starts a fresh random network and goes round `outer` times: match, class by class, the gradients of the
cross-entropy (per output unit, cosine; biases and norms do not count), take a step in the pixels, then train the
network on the synthetic images for `inner` epochs (SGD without momentum, not after the last round). `augment.groups:
''` is DC. Published rounds: 1 and 1 (ipc 1), 10 and 50 (ipc 10), 50 and 10 (ipc 50). The real side of the distance has
no gradient. Evaluation reports the last epoch.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from stillhouse.functional.augmentation import apply
from stillhouse.functional.matching import Metric, gradient_distance, gradients
from stillhouse.randomness import permutation
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.run import Run
from stillhouse.synthetic.config import PixelConfig
from stillhouse.synthetic.product import SyntheticSet
from stillhouse.synthetic.synthesis import Synthesis, plan
from stillhouse.synthetic.training import augmentation


class Config(PixelConfig):
    lr: float = Field(0.1, gt=0, description="Of the pixels: SGD.")
    outer: int = Field(1, ge=1, description="Rounds with one network.")
    inner: int = Field(1, ge=0, description="Epochs of the network on the synthetic images between rounds.")
    network_lr: float = Field(0.01, gt=0, description="Of the network: SGD.")
    metric: Metric = Field(
        "units",
        description="Of gradients: cosine by output unit of each weight (published), or mse or cos of all as one "
        "vector.",
    )
    batch_train: int = Field(256, ge=1, description="Synthetic images of a step of the network.")


class GradientMatching(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        does = f"match gradients of {config.batch_real} real images a class, {config.outer} rounds a network"
        return plan(run, config, "dsa", does, config.iterations * config.outer)

    def run(self, config: Config, run: Run) -> SyntheticSet:
        made = Synthesis(config, run)
        network = made.network(0).requires_grad_(True)

        def loss(i: int) -> Tensor:
            number, turn = divmod(i, config.outer)
            if not turn:
                network.load_state_dict(made.network(number).state_dict())
            real, synthetic = made.batches(i)
            total = []
            for c, (r, s) in enumerate(zip(real.chunk(made.classes), synthetic.chunk(made.classes))):
                wanted = gradients(network, r, torch.full((len(r),), c, device=r.device))
                found = gradients(network, s, torch.full((len(s),), c, device=s.device), create_graph=True)
                total.append(gradient_distance(wanted, found, config.metric))
            return torch.stack(total).sum()

        def train(i: int) -> None:
            """The network's own training between rounds, on the images as they are now."""
            if (i + 1) % config.outer == 0:
                return
            drawn, images = made.generator("inner", i), made.images.detach()
            for epoch in range(config.inner):
                order = torch.tensor(permutation(len(images), run.seed, "inner", i, epoch), device=images.device)
                for rows in order.split(config.batch_train):
                    x, y = images[rows], made.labels[rows]
                    if config.mirror:
                        x, y = torch.cat([x, x.flip(-1)]), y.repeat(2)
                    x = apply(x, augmentation(config.augment, len(x), made.size, drawn))
                    steps = torch.autograd.grad(F.cross_entropy(network(x), y), list(network.parameters()))
                    with torch.no_grad():
                        for p, g in zip(network.parameters(), steps):
                            p.sub_(g, alpha=config.network_lr)

        made.learn("dsa", loss, extra={"network": network}, after=train, steps=config.iterations * config.outer)
        return made.product()
