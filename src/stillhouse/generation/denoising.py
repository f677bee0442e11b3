"""Denoisers: networks with what their outputs mean, their training on data with prompts, and base models as stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stillhouse.config.specs import DataSpec, ModelSpec
from stillhouse.errors import UserError
from stillhouse.functional.diffusion import (
    Clean,
    Denoise,
    Parametrisation,
    Sampler,
    Schedule,
    clean,
    denoising_loss,
    guided,
)
from stillhouse.generation.config import DenoiserSpec, Prompts
from stillhouse.models import build
from stillhouse.randomness import keyed
from stillhouse.runs.method import Stage
from stillhouse.runs.products import state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch
from stillhouse.tasks.classification import Classification
from stillhouse.training.context import Progress
from stillhouse.training.module import TrainingModule

BASE = Stage("base", "train the base model on the data (stored, shared)")


@dataclass
class Denoiser:
    """A network of noisy samples, steps and prompts.

    Attributes:
        module: (samples (B, ...), steps (B,), prompts (B,)) -> output shaped as the samples.
        predicts: what its output is.
        schedule: of the noise.
        prompts: how many there are; the number after the last one means none.
    """

    module: nn.Module
    predicts: Parametrisation
    schedule: Schedule
    prompts: int

    def output(self, x: Tensor, t: Tensor, label: Tensor, guidance: float = 0.0) -> Tensor:
        """The network's output at samples (B, ...), steps (B,) and prompts (B,), guided above a `guidance` of 1: both
        calls are one of twice the size."""
        if guidance <= 1:
            found: Tensor = self.module(x, t, label)
            return found
        nothing = torch.full_like(label, self.prompts)
        both: Tensor = self.module(torch.cat([x, x]), torch.cat([t, t]), torch.cat([label, nothing]))
        return guided(both[: len(x)], both[len(x) :], guidance)

    def clean(self, x: Tensor, t: Tensor, label: Tensor, guidance: float = 0.0) -> Clean:
        """The clean sample and the noise that the network sees in noisy samples."""
        return clean(self.predicts, self.output(x, t, label, guidance), x, *self.schedule.at(t, x))

    def denoise(self, label: Tensor, guidance: float = 0.0) -> Denoise:
        """The network with its prompts (B,), as samplers call it."""
        return lambda x, t: self.output(x, t, label, guidance)

    def fits(self, sampler: Sampler) -> None:
        """Raises `UserError` for a sampler of another schedule or parametrisation."""
        if sampler.kind != self.predicts or sampler.schedule.straight != self.schedule.straight:
            raise UserError(
                f"The sampler reads outputs as {sampler.kind}, but this network predicts {self.predicts}; make it of "
                "the network's own schedule."
            )


class Denoising(TrainingModule):
    """Training module of a denoiser: random steps and noise, prompts dropped now and then.

    Args:
        student: the network.
        spec: what it predicts, and how it is trained.
        prompts: of the data's classes.
    """

    def __init__(self, student: nn.Module, spec: DenoiserSpec, prompts: Prompts) -> None:
        super().__init__()
        self.student, self.spec, self.prompts = student, spec, prompts
        schedule = spec.schedule.build()
        self.register_buffer("alpha", schedule.alpha, persistent=False)
        self.register_buffer("sigma", schedule.sigma, persistent=False)
        self.register_buffer("of_class", torch.tensor(prompts.of_class), persistent=False)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        x0 = batch["input"]
        label: Tensor = self.of_class[batch["label"]]  # type: ignore[index]
        dropped = torch.rand(len(x0), device=x0.device) < self.spec.drop
        label = label.masked_fill(dropped | (label < 0), len(self.prompts.names))
        schedule = Schedule(self.alpha, self.sigma)  # type: ignore[arg-type]
        t = torch.randint(schedule.steps, (len(x0),), device=x0.device)
        eps = torch.randn_like(x0)
        levels = schedule.at(t, x0)
        output = self.student(levels[0] * x0 + levels[1] * eps, t, label)
        return {"loss": denoising_loss(self.spec.predicts, output, x0, eps, *levels, self.spec.gamma)}


def new_network(spec: ModelSpec, prompts: Prompts, shape: tuple[int, ...], *keys: int | str) -> nn.Module:
    """A network for so many prompts and samples of this shape, initialised as the keys say. Raises `UserError` for one
    that is no denoiser."""
    with keyed("denoiser", *keys):
        module = build(spec, len(prompts.names), shape)
    example = torch.zeros(1, *shape), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    try:
        with torch.no_grad():
            found = module(*example)
    except TypeError:
        found = None
    if not isinstance(found, Tensor) or found.shape != example[0].shape:
        raise UserError(
            f"'{spec.model}' is no denoiser: it must give an output shaped as its samples for samples, steps and "
            "prompts. Take stillhouse:dit."
        )
    return module


def base_stage(run: Run, spec: DenoiserSpec, data: DataSpec, stage: Stage = BASE) -> Stage:
    """The plan's line of a base model. Raises `UserError` for settings that do not go together."""
    spec.check()
    if spec.train is None:
        return stage.filled(does="load the base model", models={"base": spec.model})
    steps = spec.train.epochs * len(run.loader(data, "train", spec.train.batch_size, train=True))
    return stage.filled(models={"base": spec.model}, steps=steps)


def base_model(run: Run, spec: DenoiserSpec, data: DataSpec, prompts: Prompts, stage: Stage = BASE) -> Denoiser:
    """A frozen denoiser in evaluation mode, from weights or trained as a stage that all recipes with the same one
    share.

    Raises:
        UserError: neither weights nor `train`, or a network that is no denoiser.
    """
    bundle = run.data(data, Classification)
    network = spec.network
    checkpoint = network.checkpoint
    if spec.train is None and checkpoint is None:
        raise UserError(f"The base model ({spec.model}) has no weights: give it a `checkpoint`, or `train`.")
    module = new_network(network, prompts, bundle.input_shape, "base", spec.seed)
    if spec.train is not None:
        train = spec.train

        def make() -> dict[str, Tensor]:
            with run.seeded(spec.seed):
                module = new_network(network, prompts, bundle.input_shape, "base", spec.seed)
                loader = run.loader(data, "train", train.batch_size, train=True)
                run.fit(stage, Denoising(module, spec, prompts), loader, train)
            return state_on_cpu(module)

        uses = {
            "denoiser": spec.model_dump(mode="json", exclude={"train"}),
            "train": train.identity(),
            "prompts": [list(prompts.names), list(prompts.of_class)],
            "data": bundle.fingerprint,
            "augment": data.model_dump(mode="json", include={"augment", "image_size"}),
        }
        module.load_state_dict(run.stage(stage, make, uses))
    module.to(run.device).eval().requires_grad_(False)
    return Denoiser(module, spec.predicts, spec.schedule.build(), len(prompts.names))
