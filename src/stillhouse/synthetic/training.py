"""Networks trained from scratch on a few images: with hard labels (by default SGD, one fall of the rate), or soft
labels of views (AdamW, cosine).

A `Training` describes what a network learns from and how; `train` does it. A product that trains in its own way
gives the judge a subclass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import LRSchedule, OptimizerSpec, TrainSpec
from stillhouse.data.augment import mix
from stillhouse.errors import UserError
from stillhouse.functional.augmentation import Draws, all_of, apply, groups_of, one_of
from stillhouse.randomness import generator, permutation
from stillhouse.runs.run import Run
from stillhouse.synthetic.config import AugmentSpec, EvaluateSpec
from stillhouse.synthetic.product import SyntheticSet
from stillhouse.synthetic.scores import soft_loss
from stillhouse.training.optimizers import make_optimizer, rate_factor

Key = tuple[int | str, ...]


def augmentation(spec: AugmentSpec, count: int, size: tuple[int, int], drawn: torch.Generator) -> Draws:
    """The draws of a recipe's augmentation: what is always applied, then one of the groups; `count` 1 is Siamese."""
    return all_of(groups_of(spec.always), count, size, drawn) + one_of(groups_of(spec.groups), count, size, drawn)


@dataclass
class Training:
    """What a network learns from and how. A subclass gives `steps_per_epoch` and `loss`, and may change the parameters'
    groups and the rate.

    Attributes:
        images: (N, C, H, W), on the device.
        schedule: None: after half the epochs the rate falls to a tenth, and the optimiser's state (its momentum) begins
            at 0 again.
        mixup, cutmix: alphas; 0 is off. With both on, each mixed batch takes one of the two at random.
        mix_probability: share of the batches that are mixed.
        key: of all its draws.
    """

    images: Tensor
    epochs: int
    optimizer: str
    lr: float
    weight_decay: float
    schedule: LRSchedule | None
    augment: AugmentSpec
    align_corners: bool
    mixup: float
    cutmix: float
    mix_probability: float
    key: Key

    @property
    def steps_per_epoch(self) -> int:
        raise NotImplementedError

    def loss(self, network: nn.Module, i: int) -> Tensor:
        """Of step i, a scalar."""
        raise NotImplementedError

    def groups(self, network: nn.Module) -> list[dict[str, Any]]:
        """The parameters, in groups that may have a `weight_decay` of their own."""
        return [{"params": list(network.parameters())}]

    def rate(self, epoch: float) -> float:
        """The factor on `lr` in an epoch."""
        return (0.1 if epoch >= self._turn else 1.0) if self.schedule is None else rate_factor(self._spec, epoch)

    def new_optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(self.groups(network), self._spec)

    def step(self, network: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> Tensor:
        """One step of the optimiser at the rate of its epoch; returns the loss."""
        epoch, at = divmod(i, self.steps_per_epoch)
        if self.schedule is None and epoch == self._turn and not at:
            optimizer.state.clear()
        rate = self.lr * self.rate(epoch)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(network, i)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def augmented(self, x: Tensor, i: int) -> Tensor:
        """Images (B, C, H, W) as step i sees them, each under a draw of its own."""
        drawn = generator(*self.key, "augment", i)
        return apply(x, augmentation(self.augment, len(x), (x.shape[-2], x.shape[-1]), drawn), self.align_corners)

    def mixed_loss(self, network: nn.Module, x: Tensor, loss: Callable[[Tensor, Tensor], Tensor], i: int) -> Tensor:
        """The loss of a batch (B, C, H, W), in step i mixed within itself or not: to both images' labels, by their
        shares.

        Args:
            loss: (logits (B, classes), rows (B,)) -> the mean loss to the labels of these rows of the batch.
        """
        drawn = generator(*self.key, "mix", i)
        own = torch.arange(len(x))
        if not (self.mixup or self.cutmix) or float(torch.rand((), generator=drawn)) >= self.mix_probability:
            return loss(network(x), own)
        partner = torch.randperm(len(x), generator=drawn)
        whole = x.new_ones(1, 1)  # of the own label, of which mixing leaves its share
        x, share = mix(x, x[partner.to(x.device)], whole, 0 * whole, self.mixup, self.cutmix, (*self.key, "mix", i))
        logits, share = network(x), share.squeeze()
        return share * loss(logits, own) + (1 - share) * loss(logits, partner)

    def facts(self) -> dict[str, Any]:
        """All that the training depends on but its images and labels, as JSON data."""
        facts = {k: v for k, v in vars(self).items() if not isinstance(v, Tensor | SyntheticSet)}
        return {
            "kind": type(self).__name__,
            **{k: v.model_dump() if hasattr(v, "model_dump") else v for k, v in facts.items()},
        }

    @property
    def _turn(self) -> int:
        return self.epochs // 2 + 2  # published: after epoch E/2 + 1

    @property
    def _spec(self) -> TrainSpec:
        optimizer = OptimizerSpec(name=self.optimizer, lr=self.lr, weight_decay=self.weight_decay)
        return TrainSpec(epochs=self.epochs, optimizer=optimizer, schedule=self.schedule or LRSchedule())


@dataclass
class HardTraining(Training):
    """Training with class ids."""

    labels: Tensor
    batch_size: int

    @classmethod
    def of(
        cls, images: Tensor, labels: Tensor, spec: EvaluateSpec, augment: AugmentSpec, lr: float | None, key: Key
    ) -> HardTraining:
        """With the options of `evaluate`; `lr` where it names no rate, and else 0.01."""
        return cls(
            images=images,
            epochs=spec.epochs,
            optimizer=spec.optimizer or "sgd",
            lr=spec.lr or lr or 0.01,
            weight_decay=5e-4 if spec.weight_decay is None else spec.weight_decay,
            schedule=spec.schedule,
            augment=augment,
            align_corners=spec.align_corners,
            mixup=spec.mixup,
            cutmix=spec.cutmix,
            mix_probability=spec.mix_probability,
            key=key,
            labels=labels,
            batch_size=min(spec.batch_size or 256, len(images)),
        )

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def loss(self, network: nn.Module, i: int) -> Tensor:
        epoch, at = divmod(i, self.steps_per_epoch)
        order = permutation(len(self.images), *self.key, "order", epoch)
        rows = torch.tensor(order[at * self.batch_size : (at + 1) * self.batch_size], device=self.images.device)
        labels = self.labels[rows]
        return self.mixed_loss(
            network,
            self.augmented(self.images[rows], i),
            lambda z, which: F.cross_entropy(z, labels[which.to(z.device)]),
            i,
        )


@dataclass
class SoftTraining(Training):
    """Training with the stored logits of images, or of views, KL at a temperature without T^2."""

    synthetic: SyntheticSet
    temperature: float
    batch_size: int

    @classmethod
    def of(
        cls, synthetic: SyntheticSet, spec: EvaluateSpec, augment: AugmentSpec, device: torch.device, key: Key
    ) -> SoftTraining:
        """With the options of `evaluate`.

        Raises `UserError` for a set without soft labels, and for views that would be mixed again.
        """
        if synthetic.views is None and synthetic.soft is None:
            raise UserError(
                "evaluate.protocol is soft, but the synthetic set holds no soft labels; take evaluate.protocol=hard."
            )
        if synthetic.views is not None and (spec.mixup or spec.cutmix):
            raise UserError(
                "evaluate.mixup and evaluate.cutmix cannot mix views, whose soft labels hold as they are; mix them "
                "when they are labelled."
            )
        return cls(
            images=synthetic.training_images()[0].to(device),
            epochs=spec.epochs,
            optimizer=spec.optimizer or "adamw",
            lr=spec.lr or 1e-3,
            weight_decay=0.01 if spec.weight_decay is None else spec.weight_decay,
            schedule=spec.schedule or LRSchedule(name="cosine"),
            augment=augment,
            align_corners=spec.align_corners,
            mixup=spec.mixup,
            cutmix=spec.cutmix,
            mix_probability=spec.mix_probability,
            key=key,
            synthetic=synthetic,
            temperature=spec.temperature,
            batch_size=spec.batch_size or 64,
        )

    def order(self, epoch: int) -> tuple[Tensor, ...]:
        """The rows of the batches of an epoch."""
        if self.synthetic.views is not None:
            return self.synthetic.views.order(len(self.images), epoch)
        return torch.tensor(permutation(len(self.images), *self.key, "order", epoch)).split(self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.order(0))

    def loss(self, network: nn.Module, i: int) -> Tensor:
        epoch, at = divmod(i, self.steps_per_epoch)
        rows = self.order(epoch)[at]
        if self.synthetic.views is not None:
            x, logits = self.synthetic.views.batch(self.images, rows, epoch, at)
            return self.soft_loss(network(x), logits)
        assert self.synthetic.soft is not None
        x, logits = self.augmented(self.images[rows.to(self.images.device)], i), self.synthetic.soft[rows]
        return self.mixed_loss(network, x, lambda z, which: self.soft_loss(z, logits[which]), i)

    def soft_loss(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """KL of a batch, both (B, classes)."""
        return soft_loss(logits, teacher_logits.to(logits.device).float(), "kl", self.temperature)


class Best:
    """The best accuracy after every so many epochs of a training, and after the last.

    Its state is part of the training's checkpoint.
    """

    def __init__(self, every: int, accuracy: Callable[[nn.Module], float]) -> None:
        self.every, self.accuracy, self.value = every, accuracy, 0.0

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.value = state["value"]


def train(run: Run, name: str, network: nn.Module, training: Training, best: Best | None = None) -> float:
    """Train the network in place by the run's loop (so that a killed run resumes), and leave it in evaluation mode;
    returns the seconds spent."""
    optimizer = training.new_optimizer(network)
    network.train()
    each = training.steps_per_epoch
    steps = training.epochs * each

    def step(i: int) -> Mapping[str, Tensor]:
        loss = training.step(network, optimizer, i)
        if best is not None and ((i + 1) % (each * best.every) == 0 or i + 1 == steps):
            best.value = max(best.value, best.accuracy(network))
        return {"loss": loss}

    state: dict[str, Any] = {"network": network, "optimizer": optimizer} | ({} if best is None else {"best": best})
    seconds = run.loop(name, state, step, steps)
    network.eval()
    return seconds
