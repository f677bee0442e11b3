"""Soft labels by epoch and view (fast knowledge distillation, as in SRe2L, arXiv 2306.13092): the teacher's logits of augmented, mixed images.

A view is a function of (seed, epoch, batch), so only the logits are kept: crops, flips, boxes and partners are drawn again when a network is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.functional.siamese import Strength, all_of, apply, groups_of
from stillhouse.randomness import generator, key, permutation
from stillhouse.recipe import Spec


class Views(Spec):
    """How images are seen while they are labelled, and again while a network is trained."""

    epochs: int = Field(100, ge=1, description="Different views of every image; a longer training goes round.")
    batch_size: int = Field(64, ge=1)
    augment: str = Field("resized_crop_flip", description="All of these, an own draw for each image.")
    area: float = Field(0.08, gt=0, le=1, description="resized_crop: the smallest share of the image.")
    mix: Literal["none", "cutmix", "mixup"] = Field("cutmix", description="With other images of the batch, one draw a batch.")
    alpha: float | None = Field(None, gt=0, description="Of the Beta; default: 1 (cutmix), 0.8 (mixup).")
    seed: int = 0

    def batches(self, images: Tensor, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The views (b, C, H, W) of one epoch, and which images (b,) they are."""
        order = torch.tensor(permutation(len(images), self.seed, "views", epoch))
        for number, rows in enumerate(order.split(self.batch_size)):
            yield self.batch(images, rows, epoch, number), rows

    def batch(self, images: Tensor, rows: Tensor, epoch: int, number: int) -> Tensor:
        """The views of these rows as batch `number` of an epoch."""
        drawn = generator(self.seed, "view", epoch, number)
        x = images[rows.to(images.device)]
        groups = groups_of(self.augment)
        x = apply(x, all_of(groups, len(x), (x.shape[-2], x.shape[-1]), drawn, Strength(area=self.area)))
        if self.mix == "none" or len(x) < 2:
            return x
        partner = x[torch.randperm(len(x), generator=drawn).to(x.device)]
        rng = np.random.default_rng(key(self.seed, "mix", epoch, number))
        return _cut(x, partner, rng, self.alpha or 1.0) if self.mix == "cutmix" else _blend(x, partner, rng, self.alpha or 0.8)


def _blend(x: Tensor, partner: Tensor, rng: np.random.Generator, alpha: float) -> Tensor:
    return torch.lerp(partner, x, float(rng.beta(alpha, alpha)))


def _cut(x: Tensor, partner: Tensor, rng: np.random.Generator, alpha: float) -> Tensor:
    """A box of the partner; its sides are sqrt(1 - lam) of the image's, its centre anywhere."""
    height, width = x.shape[-2:]
    side = (1 - rng.beta(alpha, alpha)) ** 0.5
    half_h, half_w = int(height * side) // 2, int(width * side) // 2
    y, z = int(rng.integers(height)), int(rng.integers(width))
    out = x.clone()
    box = (slice(None), slice(None), slice(max(y - half_h, 0), y + half_h), slice(max(z - half_w, 0), z + half_w))
    out[box] = partner[box]
    return out


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
        return torch.tensor(permutation(count, self.made.seed, "views", epoch % self.made.epochs)).split(self.made.batch_size)


@torch.no_grad()
def relabel(teachers: list[nn.Module], images: Tensor, made: Views) -> ViewLabels:
    """The mean logits of the teachers (in evaluation mode, on the images' device) for all views."""
    logits: Tensor | None = None
    for epoch in range(made.epochs):
        for x, rows in made.batches(images, epoch):
            said = torch.stack([teacher(x).float() for teacher in teachers]).mean(0).half().cpu()
            if logits is None:
                logits = torch.zeros(made.epochs, len(images), said.shape[1], dtype=torch.float16)
            logits[epoch, rows] = said
    assert logits is not None
    return ViewLabels(made, logits)
