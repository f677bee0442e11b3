"""Training batches that replay stored regions: several regions of each image that is loaded, picked among those whose
labels survived."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.data import BatchKey, IndexedDataset
from stillhouse.methods.classification.ferkd.labels import (
    DISCARDED,
    HARDENED,
    KEPT,
    adapt,
    bands,
    cutmix,
    within_images,
)
from stillhouse.methods.classification.ferkd.regions import RegionStore, replay
from stillhouse.randomness import key as keys
from stillhouse.randomness import keyed, permutation, uniforms
from stillhouse.signals import Batch

Mixing = Literal["selfmix", "batch", "none"]


@dataclass(frozen=True)
class Thresholds:
    """Which stored labels are trusted: see `labels.bands`. The default trusts all, which is FKD."""

    low: float = 0.0
    middle: float = 0.0
    high: float = 1.0
    smoothing: float = 0.1

    def of(self, confidence: Tensor) -> Tensor:
        """(n, K) bands; an image that would lose every region keeps its most confident one, with the smoothed label of
        the image."""
        band = bands(confidence, self.low, self.middle, self.high)
        lost = ~((band == HARDENED) | (band == KEPT)).any(1)
        best = F.one_hot(confidence.argmax(1), confidence.shape[1]).bool()
        return torch.where(lost[:, None], torch.where(best, HARDENED, DISCARDED).to(torch.int8), band)


@dataclass(frozen=True)
class MixSpec:
    """How regions of a batch are mixed, at each batch: not at all, CutMix between regions of one image (`selfmix`), or
    mixup or CutMix across the batch."""

    how: Mixing = "selfmix"
    mixup: float = 0.8
    cutmix: float = 1.0
    probability: float = 1.0
    switch: float = 0.5


class RegionReplay:
    """The data set of a student that replays a store (as `stillhouse.data.Loader` takes one).

    Its epoch has as many samples as there are images. A pass loads every image once and takes `crops` regions of each,
    so it lasts `crops` epochs; in the last `crops` epochs every image gives one region. Read it in order
    (`shuffle=False`): the order of the images is drawn here, of (seed, pass).

    Args:
        images: the images as they are evaluated, (B, C, H, W) normalised.
        store: their regions.
        batch_size: samples of a batch over all processes; a multiple of `crops`.
        epochs: of the training.
        crops: regions taken from each loaded image.
        thresholds: which labels are trusted.
        mixing: of the regions.
    """

    def __init__(
        self,
        images: IndexedDataset,
        store: RegionStore,
        batch_size: int,
        epochs: int,
        crops: int,
        thresholds: Thresholds,
        mixing: MixSpec,
    ) -> None:
        self.images, self.store, self.epochs, self.crops = images, store, epochs, crops
        self.thresholds, self.mixing = thresholds, mixing
        self._targets = images.labels()
        self._slots = len(images) // batch_size * batch_size
        self._order = lru_cache(maxsize=2)(
            lambda seed, number: np.array(permutation(len(images), seed, "order", number), dtype=np.int64)
        )

    def __len__(self) -> int:
        return len(self.images)

    def labels(self) -> Tensor:
        """(n,) class ids, by image."""
        return self._targets

    def batch(self, key: BatchKey, seed: int) -> Batch:
        """`input` (B, C, H, W), `label` (B,) of the images, `index` (B,) of the images, and `stored` (B, classes), the
        label to learn."""
        slots = key.indices[key.start : key.stop]
        crops = 1 if key.epoch >= self.epochs - self.crops else self.crops
        number = key.epoch if crops == 1 else key.epoch // self.crops
        share = 0 if crops == 1 else key.epoch % self.crops * self._slots
        rows = self._order(seed, f"{crops}.{number}")[(share + slots[::crops]) // crops]
        whole = self.images.batch(BatchKey(0, rows, 0, len(rows)), seed)
        band = self.thresholds.of(self.store.confidence(rows))
        picks = _pick(band.numpy(), crops, uniforms(keys(seed, "pick", crops, number), rows, band.shape[1]))
        coords, flips = self.store.regions(rows, picks)
        x = replay(whole["input"], coords, flips, tuple(whole["input"].shape[-2:])).flatten(0, 1)
        targets = self._targets[torch.from_numpy(rows)][:, None].expand(-1, crops)
        soft = adapt(
            self.store.labels(rows, picks), targets, band.gather(1, torch.from_numpy(picks)), self.thresholds.smoothing
        ).flatten(0, 1)
        x, soft = self._mixed(x, soft, crops, (seed, "mix", key.epoch, int(slots[0])))
        return {
            "input": x,
            "label": targets.flatten(),
            "index": torch.from_numpy(rows).repeat_interleave(crops),
            "stored": soft,
        }

    def _mixed(self, x: Tensor, soft: Tensor, crops: int, draw: tuple[int | str, ...]) -> tuple[Tensor, Tensor]:
        mixing, count = self.mixing, len(x)
        if mixing.how == "none" or (mixing.how == "selfmix" and crops == 1):
            return x, soft
        with keyed(*draw):
            if np.random.random() >= mixing.probability:
                return x, soft
            blend = (
                mixing.how == "batch"
                and mixing.mixup > 0
                and (mixing.cutmix == 0 or np.random.random() < mixing.switch)
            )
            share = float(
                np.random.beta(mixing.mixup, mixing.mixup) if blend else np.random.beta(mixing.cutmix, mixing.cutmix)
            )
            centre = (int(np.random.randint(x.shape[-2])), int(np.random.randint(x.shape[-1])))
            partner = (
                torch.randperm(count)
                if mixing.how == "batch"
                else within_images(crops, count // crops, torch.randperm(crops))
            )
        if blend:
            return share * x + (1 - share) * x[partner], share * soft + (1 - share) * soft[partner]
        return cutmix(x, soft, share, centre, partner)


def _pick(band: np.ndarray, count: int, draws: np.ndarray) -> np.ndarray:
    """(n, count) regions of each image, drawn without replacement from those that survived; too few are repeated in
    turn.

    Args:
        band: (n, K).
        draws: (n, K) uniform numbers.
    """
    survived = (band == HARDENED) | (band == KEPT)
    order = np.argsort(draws + 2.0 * ~survived, axis=1)
    return np.take_along_axis(order, np.arange(count)[None, :] % survived.sum(1)[:, None], axis=1)
