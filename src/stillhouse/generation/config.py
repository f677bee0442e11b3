"""What recipes of generation share: noise schedules, samplers, prompts, denoisers and how samples are judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.config.specs import Data, MethodConfig, ModelSpec, OptimizerSpec, Spec, TrainSpec
from stillhouse.errors import UserError, unknown
from stillhouse.functional import diffusion
from stillhouse.functional.diffusion import Parametrisation, Sampler, SamplerName, Schedule, ScheduleName, Spacing


class ScheduleSpec(Spec):
    """A noise schedule."""

    name: ScheduleName = Field("flow", description="linear, scaled_linear, cosine, or flow (a straight path).")
    steps: int = Field(1000, ge=1, description="T, the steps at which networks are trained.")
    beta: tuple[float, float] = Field((1e-4, 0.02), description="linear, scaled_linear: the first and the last beta.")
    shift: float = Field(1.0, gt=0, description="flow: more steps with much noise above 1.")
    zero_terminal: bool = Field(False, description="Leave nothing of the sample at the last step.")

    def build(self) -> Schedule:
        """The schedule. Raises `UserError` for what does not go together."""
        options = {"beta": self.beta, "shift": self.shift, "zero_terminal": self.zero_terminal}
        return diffusion.schedule(self.name, self.steps, **options)  # type: ignore[arg-type]


class SamplerSpec(Spec):
    """How samples are drawn."""

    name: SamplerName = Field(
        "ddim",
        description="ddim (of a flow: Euler's), renoise (a share of the noise newly), lcm, euler, euler_ancestral.",
    )
    steps: int = Field(50, ge=1, description="Calls of the network, or with guidance pairs of calls.")
    spacing: Spacing = Field("trailing", description="trailing, leading, linspace or consistency.")
    offset: int = Field(0, ge=0, description="leading: added to the steps.")
    eta: float = Field(1.0, ge=0, le=1, description="renoise: the share of noise that stays.")
    guidance: float = Field(0.0, ge=0, description="Classifier-free guidance; up to 1: none, the condition alone.")

    def build(self, schedule: Schedule, kind: Parametrisation) -> Sampler:
        """The sampler of a network. Raises `UserError` for what does not go together."""
        steps = diffusion.sampling_steps(schedule.steps, self.steps, self.spacing, self.offset)
        return Sampler(self.name, schedule, kind, steps, eta=self.eta)


def _training() -> TrainSpec:
    return TrainSpec(
        epochs=40,
        batch_size=128,
        optimizer=OptimizerSpec(name="adamw", lr=1e-3, weight_decay=0.0),
        clip=1.0,
        ema=0.995,
        eval_every=0,
    )


class DenoiserSpec(ModelSpec):
    """A conditional denoiser: from weights, or trained here first, once for every recipe with the same one."""

    predicts: Parametrisation = Field("flow", description="What its output is: eps, x0, v or flow.")
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec)
    train: TrainSpec | None = Field(default_factory=_training, description="How it is trained; null: it has weights.")
    drop: float = Field(0.1, ge=0, le=1, description="Share of the prompts left out in training, for guidance.")
    gamma: float | None = Field(None, gt=0, description="min-SNR weights with this bound; null: none.")
    seed: int = Field(0, description="Of its own training; one serves all seeds of a comparison.")

    @property
    def network(self) -> ModelSpec:
        """The network alone."""
        return ModelSpec(**self.model_dump(include=set(ModelSpec.model_fields)))

    def check(self) -> None:
        """Raises `UserError` where schedule and parametrisation do not go together."""
        if (self.schedule.name == "flow") != (self.predicts == "flow"):
            raise UserError(
                f"A denoiser that predicts {self.predicts} does not go with the schedule {self.schedule.name}: flow "
                "goes with flow; eps, x0 and v go with the others."
            )
        if self.predicts == "eps" and self.schedule.zero_terminal:
            raise UserError("Where nothing of the sample is left at the last step, eps says nothing of it; predict v.")
        if self.schedule.build().sigma[0] <= 0:
            raise UserError("The first step of a schedule must have noise.")


class JudgeSpec(Spec):
    """How samples are judged, in the features of a probe."""

    samples: int = Field(128, ge=2, description="Samples of each prompt.")
    batch: int = Field(128, ge=1, description="Samples at once.")
    seed: int = Field(0, description="Of their noise, which all networks share.")


class ProbeSpec(ModelSpec):
    """A classifier of the data, by whose features and classes samples are judged."""

    model: str = Field("stillhouse:mlp", description="As of a student.")
    options: dict[str, Any] = Field(default_factory=lambda: {"widths": [64]})
    train: TrainSpec = Field(
        default_factory=lambda: TrainSpec(
            epochs=20, batch_size=64, optimizer=OptimizerSpec(name="adamw", lr=2e-3), eval_every=0
        ),
        description="How it is trained.",
    )

    @property
    def network(self) -> ModelSpec:
        """The network alone."""
        return ModelSpec(**self.model_dump(include=set(ModelSpec.model_fields)))


class GenerationConfig(MethodConfig):
    """What recipes of generation share."""

    data: Data = Field(description="Images or clips with classes.")
    prompts: dict[str, list[str | int]] | None = Field(
        None,
        description="The prompts, each with the classes that it means, by name or number; null: one for each class.",
    )
    probe: ProbeSpec = Field(default_factory=ProbeSpec, description="The classifier by which samples are judged.")
    judge: JudgeSpec = Field(default_factory=JudgeSpec)


def _place(member: str | int, classes: list[str], prompt: str) -> int:
    """The class of a name, or else of a number."""
    if str(member) in classes:
        return classes.index(str(member))
    if isinstance(member, int) and 0 <= member < len(classes):
        return member
    raise unknown(f"class of prompts.{prompt}", str(member), classes)


@dataclass(frozen=True)
class Prompts:
    """The conditions of a generator.

    Attributes:
        names: of the prompts.
        of_class: the prompt of each class of the data, in label order; -1: of none.
    """

    names: tuple[str, ...]
    of_class: tuple[int, ...]

    @classmethod
    def read(cls, prompts: Mapping[str, Sequence[str | int]] | None, classes: Sequence[str]) -> Prompts:
        """The prompts of a recipe for data with these classes.

        Raises:
            UserError: a class that the data does not have, or that two prompts mean.
        """
        if prompts is None:
            return cls(tuple(classes), tuple(range(len(classes))))
        found = [-1] * len(classes)
        for number, (name, members) in enumerate(prompts.items()):
            for member in members:
                place = _place(member, list(classes), name)
                if found[place] != -1:
                    raise UserError(f"prompts: the class '{member}' belongs to two of them.")
                found[place] = number
            if not members:
                raise UserError(f"prompts.{name} means no class; name one or more.")
        return cls(tuple(prompts), tuple(found))

    def labels(self, classes: Tensor) -> Tensor:
        """The prompts (B,) of class ids (B,)."""
        return torch.tensor(self.of_class, device=classes.device)[classes]

    def number(self, text: str) -> int:
        """The prompt of a name. Raises `UserError` with the nearest."""
        if text not in self.names:
            raise unknown("prompt", text, self.names)
        return self.names.index(text)
