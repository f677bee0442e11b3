"""The two kinds of generators that are quantised, each with its batches, its losses and its figures: models of discrete
tokens and diffusion models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Spec
from stillhouse.data.loader import BatchLoader, Loader
from stillhouse.functional import diffusion
from stillhouse.functional.diffusion import Schedule, ScheduleName
from stillhouse.functional.token_losses import forward_kl_rows
from stillhouse.generation.config import Prompts
from stillhouse.generation.denoising import Denoiser
from stillhouse.methods.generation.low_bit_generation.tokenizer import ImageTokenizer
from stillhouse.models.dit import DiT
from stillhouse.randomness import generator, uniforms
from stillhouse.randomness import key as keys
from stillhouse.signals import Batch, to_device
from stillhouse.tasks.base import Task
from stillhouse.training.context import Progress
from stillhouse.training.module import TrainingModule


class LabelledImages(BatchLoader):
    """Batches of images with prompts, hidden in a share of them, drawn for each (seed, epoch, sample).

    Args:
        loader: of images with classes.
        prompts: of the data's classes; the number after the last one means none.
        drop: the share.
    """

    def __init__(self, loader: Loader, prompts: Prompts, drop: float) -> None:
        self.loader, self.prompts, self.drop = loader, prompts, drop

    def __len__(self) -> int:
        return len(self.loader)

    def labels(self) -> Tensor:
        return self.loader.labels()

    @property
    def dataset(self) -> object:
        """The images."""
        return self.loader.dataset

    @property
    def batch_size(self) -> int:
        """Images of one batch over all processes."""
        return self.loader.batch_size

    @property
    def count(self) -> int:
        """Images, over all processes."""
        return self.loader.count

    @property
    def usual_size(self) -> int:
        """Images of a full batch in one process."""
        return self.loader.usual_size

    @property
    def even(self) -> bool:
        """Whether all batches hold equally many images."""
        return self.loader.even

    def made(self, batch: Batch, label: Tensor) -> Batch:
        """The batch of images (`input`) with these prompts, some of them hidden."""
        return {"input": {"x": batch["input"], "label": label}, "index": batch["index"]}

    def batches(self, epoch: int = 0, batch: int = 0, epochs: int | None = None) -> Iterator[Batch]:
        number = epoch * len(self) + batch
        for given in self.loader.batches(epoch, batch, epochs):
            seed = keys(self.loader.seed, "hidden class", number // len(self))
            hidden = torch.from_numpy(uniforms(seed, given["index"].numpy(), 1)[:, 0] < self.drop)
            label = self.prompts.labels(given["label"])
            yield self.made(given, label.masked_fill(hidden | (label < 0), len(self.prompts.names)))
            number += 1


class TokenLoader(LabelledImages):
    """The same as codes: `input` {codes (B, L), label (B,)}, `label` (B, L) the codes.

    Args:
        tokenizer: on the device where images are encoded.
    """

    def __init__(
        self, loader: Loader, prompts: Prompts, drop: float, tokenizer: ImageTokenizer, device: torch.device
    ) -> None:
        super().__init__(loader, prompts, drop)
        self.tokenizer, self.device = tokenizer, device

    def made(self, batch: Batch, label: Tensor) -> Batch:
        codes = self.tokenizer.encode(batch["input"].to(self.device))
        return {
            "input": {"codes": codes, "label": label.to(self.device)},
            "label": codes,
            "index": batch["index"].to(self.device),
        }


@dataclass(frozen=True)
class ImageTokens(Task):
    """Logits (B, L, V) of an image's tokens, each given those before it and the class; labels (B, L)."""

    name: ClassVar[str] = "image_tokens"
    groups: ClassVar[tuple[str, ...]] = ()

    @property
    def positions(self) -> bool:
        return True


def token_figures(
    network: nn.Module, teacher: nn.Module, batches: BatchLoader, device: torch.device
) -> dict[str, float]:
    """On unseen sequences, in nats a token: `nll`, `nll_teacher`, `kl_to_teacher` (forward); and `token_agreement`, the
    share of positions at which both have the same most probable token."""
    sums = torch.zeros(4, dtype=torch.double, device=device)
    count = 0
    with torch.no_grad():
        for batch in batches:
            batch = to_device(batch, device)
            mine, theirs = network(**batch["input"]), teacher(**batch["input"])
            label = batch["label"].flatten()
            sums += torch.stack(
                [
                    F.cross_entropy(mine.flatten(0, 1), label, reduction="sum"),
                    F.cross_entropy(theirs.flatten(0, 1), label, reduction="sum"),
                    forward_kl_rows(mine, theirs.log_softmax(-1)).sum(),
                    (mine.argmax(-1) == theirs.argmax(-1)).sum(),
                ]
            ).double()
            count += label.numel()
    names = ("nll", "nll_teacher", "kl_to_teacher", "token_agreement")
    return dict(zip(names, (sums / max(count, 1)).tolist()))


# ---- diffusion -------------------------------------------------------------------------------------------------------


class DiffusionSpec(Spec):
    """A diffusion transformer of the generator's width and depth in the place of the model of tokens."""

    patch: int = Field(2, ge=1, description="Pixels a side of a token.")
    schedule: ScheduleName = Field("cosine", description="Of the noise, over 1,000 steps.")
    steps: int = Field(25, ge=1, description="Of the sampler (DDIM).")
    guidance: float = Field(0.0, ge=0, description="Classifier-free guidance; up to 1: none.")
    target: str = Field("teacher", pattern="^(teacher|noise)$", description="What the quantised model predicts.")


def noised(schedule: Schedule, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Steps (B,), noise and noisy samples, drawn by torch's generator."""
    t = torch.randint(schedule.steps, (len(x),), device=x.device)
    noise = torch.randn_like(x)
    return t, noise, schedule.add_noise(x, noise, t)


class NoisePrediction(TrainingModule):
    """Trains a denoiser towards the noise, or towards a teacher's prediction of it.

    Args:
        student: (x, t, label) -> noise.
        schedule: of the noise.
        teacher: the same in full precision; None: the noise itself.
    """

    def __init__(self, student: nn.Module, schedule: Schedule, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.student, self.schedule = student, schedule
        self._teacher = None if teacher is None else [teacher]  # out of the module tree

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        x, label = batch["input"]["x"], batch["input"]["label"]
        t, target, seen = noised(self.schedule, x)
        if self._teacher is not None:
            with torch.no_grad():
                target = self._teacher[0](seen, t, label)
        return {"loss": F.mse_loss(self.student(seen, t, label), target)}


def denoising_figures(
    network: nn.Module, teacher: nn.Module, batches: BatchLoader, schedule: Schedule, device: torch.device
) -> dict[str, float]:
    """On unseen images: `noise_mse`, `noise_mse_teacher`, and `noise_to_teacher`, the mean square difference of both
    predictions."""
    sums = torch.zeros(3, dtype=torch.double, device=device)
    draw, count = generator("denoising figures"), 0
    with torch.no_grad():
        for batch in batches:
            batch = to_device(batch, device)
            x, label = batch["input"]["x"], batch["input"]["label"]
            t = torch.randint(schedule.steps, (len(x),), generator=draw).to(device)
            noise = torch.randn(x.shape, generator=draw).to(device)
            seen = schedule.add_noise(x, noise, t)
            mine, theirs = network(seen, t, label), teacher(seen, t, label)
            pairs = ((mine, noise), (theirs, noise), (mine, theirs))
            sums += torch.stack([(a - b).square().sum() for a, b in pairs]).double()
            count += x.numel()
    return dict(zip(("noise_mse", "noise_mse_teacher", "noise_to_teacher"), (sums / max(count, 1)).tolist()))


def denoised(network: nn.Module, label: Tensor, spec: DiffusionSpec, noise: Tensor, prompts: int) -> Tensor:
    """Images (B, C, H, W) of prompts (B,), from noise of that shape."""
    schedule = diffusion.schedule(spec.schedule)
    sampler = diffusion.Sampler("ddim", schedule, "eps", diffusion.sampling_steps(schedule.steps, spec.steps))
    denoise = Denoiser(network, "eps", schedule, prompts).denoise(label, spec.guidance)
    return diffusion.sample(denoise, sampler, sampler.start(noise))


def diffusion_network(
    spec: DiffusionSpec, width: int, depth: int, heads: int, classes: int, shape: Sequence[int]
) -> DiT:
    """A new denoiser, initialised by torch's generator."""
    return DiT(width, depth, heads, spec.patch, num_classes=classes, input_shape=tuple(shape))


def trajectory_gap(mine: Tensor, theirs: Tensor) -> float:
    """Root mean square difference of samples drawn from the same noise."""
    return math.sqrt(float((mine - theirs).square().mean()))
