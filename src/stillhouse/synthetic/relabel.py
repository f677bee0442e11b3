"""Soft labels by epoch and view (fast knowledge distillation, as in SRe2L, arXiv 2306.13092): the teacher's logits of
augmented, mixed images.

A view is a function of (seed, epoch, batch), so only the logits are stored: crops, flips, boxes and partners are drawn
again when a network is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.config.specs import Spec
from stillhouse.functional.augmentation import Strength, all_of, apply, groups_of
from stillhouse.randomness import generator, key, permutation
from stillhouse.signals import evaluating
from stillhouse.synthetic.config import Groups


class Views(Spec):
    """How images are seen while they are labelled, and again while a network is trained."""

    epochs: int = Field(100, ge=1, description="Different views of every image; a longer training goes round.")
    batch_size: int = Field(64, ge=1)
    augment: Groups = Field("resized_crop_flip", description="All of these, an own draw for each image.")
    area: float = Field(0.08, gt=0, le=1, description="resized_crop: the smallest share of the image.")
    mix: Literal["none", "cutmix", "mixup"] = Field(
        "cutmix", description="With other images of the batch, one draw a batch."
    )
    alpha: float | None = Field(None, gt=0, description="Of the Beta; default: 1 (cutmix), 0.8 (mixup).")
    seed: int = 0

    def batches(self, images: Tensor, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The views (b, C, H, W) of one epoch, and which images (b,) they are."""
        order = torch.tensor(permutation(len(images), self.seed, "views", epoch))
        for number, rows in enumerate(order.split(self.batch_size)):
            yield self.batch(images, rows, epoch, number), rows

    def batch(self, images: Tensor, rows: Tensor, epoch: int, number: int) -> Tensor:
        """The views of these rows as batch `number` of an epoch."""
        return self.mixed(images, rows, epoch, number)[0]

    def mixed(self, images: Tensor, rows: Tensor, epoch: int, number: int) -> tuple[Tensor, Tensor, float]:
        """Views (b, C, H, W) of these rows as batch `number` of an epoch, the rows (b,) of their partners, and the
        share of the image's own pixels.

        Without mixing, and for a single image, the partner is the image itself and the share is 1.
        """
        drawn = generator(self.seed, "view", epoch, number)
        x = images[rows.to(images.device)]
        x = apply(
            x, all_of(groups_of(self.augment), len(x), (x.shape[-2], x.shape[-1]), drawn, Strength(area=self.area))
        )
        if self.mix == "none" or len(x) < 2:
            return x, rows, 1.0
        order = torch.randperm(len(x), generator=drawn)
        rng = np.random.default_rng(key(self.seed, "mix", epoch, number))
        mixes = _cut if self.mix == "cutmix" else _blend
        x, share = mixes(x, x[order.to(x.device)], rng, self.alpha or (1.0 if self.mix == "cutmix" else 0.8))
        return x, rows[order], share


def _blend(x: Tensor, partner: Tensor, rng: np.random.Generator, alpha: float) -> tuple[Tensor, float]:
    share = float(rng.beta(alpha, alpha))
    return torch.lerp(partner, x, share), share


def _cut(x: Tensor, partner: Tensor, rng: np.random.Generator, alpha: float) -> tuple[Tensor, float]:
    """A box of the partner; its sides are sqrt(1 - lam) of the image's, its centre anywhere."""
    height, width = x.shape[-2:]
    side = (1 - rng.beta(alpha, alpha)) ** 0.5
    half_h, half_w = int(height * side) // 2, int(width * side) // 2
    y, z = int(rng.integers(height)), int(rng.integers(width))
    out = x.clone()
    box = (slice(None), slice(None), slice(max(y - half_h, 0), y + half_h), slice(max(z - half_w, 0), z + half_w))
    out[box] = partner[box]
    return out, 1 - out[box][0, 0].numel() / (height * width)


@dataclass
class ViewLabels:
    """Logits (epochs, N, classes) of the views of N images, in half precision, and how the views are made."""

    made: Views
    logits: Tensor

    def batch(self, images: Tensor, rows: Tensor, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        """Views and logits (b, classes) of these rows in batch `number` of an epoch."""
        at = epoch % self.made.epochs
        return self.made.batch(images, rows, at, number), self.logits[at, rows]

    def order(self, count: int, epoch: int) -> tuple[Tensor, ...]:
        """The rows of the batches of an epoch."""
        return torch.tensor(permutation(count, self.made.seed, "views", epoch % self.made.epochs)).split(
            self.made.batch_size
        )


def running_logits(network: nn.Module, images: Tensor, batch: int = 256) -> Tensor:
    """Logits (N, classes) of images (N, C, H, W) in evaluation mode, without gradients, a batch at a time."""
    with evaluating(network):
        return torch.cat([network(x).float() for x in images.split(batch)])


@torch.no_grad()
def relabel(teachers: list[nn.Module], images: Tensor, made: Views) -> ViewLabels:
    """The mean logits of the teachers (in evaluation mode, on the images' device) for all views."""
    logits: Tensor | None = None
    for epoch in range(made.epochs):
        for x, rows in made.batches(images, epoch):
            mean = torch.stack([teacher(x).float() for teacher in teachers]).mean(0).half().cpu()
            if logits is None:
                logits = torch.zeros(made.epochs, len(images), mean.shape[1], dtype=torch.float16)
            logits[epoch, rows] = mean
    assert logits is not None
    return ViewLabels(made, logits)
