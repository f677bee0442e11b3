"""Networks trained from scratch on a few images: with hard labels (SGD, one fall of the rate) or with soft labels of views (AdamW, cosine)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.siamese import Draws, all_of, apply, groups_of, one_of
from stillhouse.randomness import generator, permutation
from stillhouse.run import Run
from stillhouse.synthetic.config import AugmentSpec, EvaluateSpec
from stillhouse.synthetic.product import SyntheticSet
from stillhouse.synthetic.scores import soft_loss


def augmentation(spec: AugmentSpec, count: int, size: tuple[int, int], drawn: torch.Generator) -> Draws:
    """The draws of a recipe's augmentation: what is always applied, then one of the groups; `count` 1 is Siamese."""
    return all_of(groups_of(spec.always), count, size, drawn) + one_of(groups_of(spec.groups), count, size, drawn)


@dataclass
class HardTraining:
    """Training with class ids: SGD with momentum 0.9; after half the epochs the rate falls to a tenth and the momentum starts anew."""

    images: Tensor
    labels: Tensor
    augment: AugmentSpec
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    key: tuple[int | str, ...]

    @classmethod
    def of(
        cls, images: Tensor, labels: Tensor, spec: EvaluateSpec, augment: AugmentSpec, lr: float | None, key: tuple[int | str, ...]
    ) -> HardTraining:
        decay = 5e-4 if spec.weight_decay is None else spec.weight_decay
        return cls(images, labels, augment, spec.epochs, min(spec.batch_size, len(images)), spec.lr or lr or 0.01, decay, key)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def optimiser(self, network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(network.parameters(), self.lr, momentum=0.9, weight_decay=self.weight_decay)

    def step(self, network: nn.Module, optimiser: torch.optim.Optimizer, i: int) -> Tensor:
        epoch, at = divmod(i, self.steps_per_epoch)
        turn = self.epochs // 2 + 2  # published: after epoch E/2 + 1
        fallen = epoch >= turn
        if epoch == turn and not at:
            optimiser.state.clear()
        for group in optimiser.param_groups:
            group["lr"] = self.lr * (0.1 if fallen else 1.0)
        order = permutation(len(self.images), *self.key, "order", epoch)
        rows = torch.tensor(order[at * self.batch_size : (at + 1) * self.batch_size], device=self.images.device)
        x = self.images[rows]
        x = apply(x, augmentation(self.augment, len(x), (x.shape[-2], x.shape[-1]), generator(*self.key, "augment", i)))
        return F.cross_entropy(network(x), self.labels[rows])


@dataclass
class SoftTraining:
    """Training with the stored logits of views, KL at a temperature without T^2: AdamW, the rate falling along a cosine by epoch."""

    images: Tensor
    synthetic: SyntheticSet
    epochs: int
    lr: float
    weight_decay: float
    temperature: float
    augment: AugmentSpec
    key: tuple[int | str, ...]

    @classmethod
    def of(cls, synthetic: SyntheticSet, spec: EvaluateSpec, augment: AugmentSpec, device: torch.device, key: tuple[int | str, ...]) -> SoftTraining:
        if synthetic.views is None and synthetic.soft is None:
            raise UserError("evaluate.protocol is soft, but the synthetic set holds no soft labels; take evaluate.protocol=hard.")
        decay = 0.01 if spec.weight_decay is None else spec.weight_decay
        images = synthetic.training_images()[0].to(device)
        return cls(images, synthetic, spec.epochs, spec.lr or 1e-3, decay, spec.temperature, augment, key)

    def _order(self, epoch: int) -> tuple[Tensor, ...]:
        if self.synthetic.views is not None:
            return self.synthetic.views.order(len(self.images), epoch)
        return torch.tensor(permutation(len(self.images), *self.key, "order", epoch)).split(64)

    @property
    def steps_per_epoch(self) -> int:
        return len(self._order(0))

    def optimiser(self, network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(network.parameters(), self.lr, weight_decay=self.weight_decay)

    def step(self, network: nn.Module, optimiser: torch.optim.Optimizer, i: int) -> Tensor:
        epoch, at = divmod(i, self.steps_per_epoch)
        for group in optimiser.param_groups:
            group["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        rows = self._order(epoch)[at]
        if self.synthetic.views is not None:
            x, logits = self.synthetic.views.batch(self.images, rows, epoch, at)
        else:
            assert self.synthetic.soft is not None
            x, logits = self.images[rows.to(self.images.device)], self.synthetic.soft[rows]
            x = apply(x, augmentation(self.augment, len(x), (x.shape[-2], x.shape[-1]), generator(*self.key, "augment", i)))
        return soft_loss(network(x), logits.to(x.device).float(), "kl", self.temperature)


def train(run: Run, name: str, network: nn.Module, training: HardTraining | SoftTraining) -> nn.Module:
    """The network, trained in place by the run's loop (so that a killed run goes on)."""
    optimiser = training.optimiser(network)
    network.train()

    def step(i: int) -> Mapping[str, Tensor]:
        loss = training.step(network, optimiser, i)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return {"loss": loss}

    run.loop(name, {"network": network, "optimiser": optimiser}, step, training.epochs * training.steps_per_epoch)
    return network.eval()
