"""Trajectory distribution matching: a few-step student learns, without data, that its noisy samples be distributed as
its teacher's along the whole way from noise (TDM, Luo et al., arXiv 2503.06674, as arXiv 2508.10774 uses it).

Two networks learn in turn. The `fake` one is trained to denoise what the student makes, so that it knows the score of
the student's distribution; the student follows the difference between the teacher's clean samples and those of the
fake one. The pieces are functions of what was drawn; `Matching` draws and holds the optimisers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.config.specs import Spec
from stillhouse.errors import UserError
from stillhouse.functional.diffusion import Clean, Schedule
from stillhouse.generation.config import DenoiserSpec, SamplerSpec
from stillhouse.generation.denoising import Denoiser
from stillhouse.runs.method import Stage
from stillhouse.runs.products import state_on_cpu
from stillhouse.runs.run import Run

STUDENT = Stage("student", "match the distributions of the teacher's trajectories (stored, shared)")
UNIT = 1e-3 / math.sqrt(64 * 64 * 4)  # of the rounding of the student's loss


class MatchingSpec(Spec):
    """Trajectory distribution matching."""

    steps: int = Field(4, ge=1, description="K: the student's steps; divide those of the schedule.")
    iterations: int = Field(300, ge=1, description="Of one update of the fake network and one of the student each.")
    batch_size: int = Field(32, ge=1, description="Samples of an iteration.")
    lr: float = Field(1e-4, gt=0, description="Of the student.")
    fake_lr: float = Field(5e-4, gt=0, description="Of the fake network.")
    betas: tuple[float, float] = Field((0.0, 0.95), description="Of both AdamW.")
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, gt=0, description="Both gradients' norm is clipped to it.")
    warmup: int = Field(5, ge=0, description="Iterations in which the rates rise; a cosine takes them to 0 after that.")
    guidance: float = Field(3.5, ge=0, description="Of the teacher in the student's update, which is learned.")
    eta: float = Field(0.9, ge=0, le=1, description="Share of the student's noise that stays from step to step.")
    anchor: float = Field(0.5, ge=0, description="Weight of the fake network's distance to the unguided teacher.")
    highest: int = Field(980, ge=1, description="Times are drawn below it, of 1,000.")
    most: float | None = Field(
        5.0, gt=0, description="Bound of the distance by which a sample's loss is divided; null: it is not."
    )
    rounding: float | None = Field(
        None, ge=0, description="c of the student's loss, sqrt(d^2 + c^2) - c; null: as published."
    )
    skip_above: float = Field(
        2.0, gt=0, description="Flow: an update of the fake network with a greater loss is left out, as published."
    )
    average: float = Field(0.0, ge=0, lt=1, description="Decay of the student's average, which is kept; 0: none.")


# ---- the pieces ----------------------------------------------------------------------------------------------------


def trajectory_times(total: int, steps: int) -> list[int]:
    """t_i = i T / K - 1 for i = 0 to K; t_0 = -1 is the clean sample. Raises `UserError` where K does not divide T."""
    if total % steps:
        raise UserError(f"The student's {steps} steps must divide the schedule's {total}.")
    return [i * total // steps - 1 for i in range(steps + 1)]


def mixed(eps: Tensor, fresh: Tensor, eta: float) -> Tensor:
    """Noise of which the share eta stays: eta eps + sqrt(1 - eta^2) fresh."""
    return eta * eps + math.sqrt(1 - eta**2) * fresh


@torch.no_grad()
def roll_out(student: Any, schedule: Schedule, noise: Tensor, fresh: Tensor, steps: int, eta: float) -> Tensor:
    """All states of the student's sampling.

    Args:
        student: (x, t (B,)) -> `Clean`.
        noise: (B, ...) the start.
        fresh: (K, B, ...) noise of each step; that of the last is not used.
        steps: K.

    Returns:
        (K + 1, B, ...): the clean sample, then the states at t_1 to t_K.
    """
    times, x, states = trajectory_times(schedule.steps, steps), noise, [noise]
    for n, i in enumerate(range(steps, 0, -1)):
        seen = student(x, torch.full((len(x),), times[i], device=x.device))
        if i == 1:
            x = seen.x0
        else:
            t = torch.full((len(x),), times[i - 1], device=x.device)
            x = schedule.add_noise(seen.x0, mixed(seen.eps, fresh[n], eta), t)
        states.append(x)
    return torch.stack(states[::-1])


class Times(NamedTuple):
    """Of each sample (B,): the state `place` that is taken up, its time, the end of its step, and the time between that
    and `highest` to which it is diffused."""

    place: Tensor
    given: Tensor
    middle: Tensor
    noisy: Tensor


def draw_times(count: int, total: int, steps: int, highest: int, device: torch.device | str = "cpu") -> Times:
    """Times by torch's generator: index in 1 to K, t in t_m to highest - 1."""
    trajectory_times(total, steps)
    place = torch.randint(1, steps + 1, (count,), device=device)
    given = place * (total // steps) - 1
    middle = given - total // steps + 1
    top = torch.full_like(middle, highest)
    room = (top - middle).clamp_min(1)
    noisy = middle + (torch.rand(count, device=device) * room).long().clamp_max(room - 1)
    return Times(place, given, middle, noisy)


class Reached(NamedTuple):
    """The student's clean samples (with gradient), where its step ends, and that diffused on (both without)."""

    x0: Tensor
    middle: Tensor
    noisy: Tensor


def student_step(
    student: Any, schedule: Schedule, states: Tensor, times: Times, fresh: Tensor, forward: Tensor, eta: float
) -> Reached:
    """A step of the student from states (K + 1, B, ...), and its end diffused to `times.noisy`.

    Args:
        fresh: (B, ...) noise of the step.
        forward: (B, ...) noise of the diffusion.
    """
    x = states[times.place, torch.arange(len(times.place), device=states.device)]
    seen: Clean = student(x, times.given)
    with torch.no_grad():
        middle = schedule.add_noise(seen.x0, mixed(seen.eps, fresh, eta), times.middle)
        (a_m, s_m), (a_t, s_t) = (schedule.at(t, x) for t in (times.middle, times.noisy))
        rest = (s_t.square() - (a_t * s_m / a_m).square()).clamp_min(1e-8 if schedule.straight else 0).sqrt()
        noisy = ((a_t / a_m) * middle + rest * forward).to(x.dtype)
    return Reached(seen.x0, middle, noisy)


def _mean_of_dims(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def fake_terms(
    fake: Clean, reached: Reached, schedule: Schedule, t: Tensor, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Distances of the fake network's clean samples to the student's, and to the unguided teacher's: (B,) each.

    Where variance is preserved, squares with the weight 1 / (1 - abar); of a flow, squares of velocities.
    """
    sigma = schedule.at(t, reached.noisy)[1]
    weight = 1 / sigma.square()  # of a flow, (x - x0) / sigma is the velocity: the same weight
    first = _mean_of_dims(weight * (fake.x0 - reached.x0.detach()).square())
    second = torch.zeros_like(first) if real is None else _mean_of_dims(weight * (fake.x0 - real).square())
    return first, second


def student_loss(
    x0: Tensor, real: Tensor, fake: Tensor, rounding: float, most: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The student's loss: its clean samples are drawn to x0 + real - fake.

    Args:
        x0: (B, ...) with gradient.
        real, fake: the guided teacher's and the fake network's, of the same noisy samples.
        rounding: c.
        most: bound of the distance to the teacher by which a sample's loss is divided; None: it is not.

    Returns:
        The loss, the target (B, ...) and the divisor (B, 1, ...).
    """
    target = (x0 + real - fake).detach()
    shape = (-1, *(1,) * (x0.ndim - 1))
    divisor = torch.ones(len(x0), device=x0.device)
    if most is not None:
        divisor = _mean_of_dims((x0.detach() - real).abs()).clamp(1e-8, most)
    distance = ((x0 - target).square() + rounding**2).sqrt() - rounding
    return (distance / divisor.view(shape)).mean(), target, divisor.view(shape)


def published_rounding(schedule: Schedule, numbers: int) -> float:
    """c for samples of so many numbers: divided by their root where variance is preserved (CogVideoX), multiplied by it
    for a flow (Wan)."""
    return UNIT * math.sqrt(numbers) if schedule.straight else UNIT / math.sqrt(numbers)


# ---- the training --------------------------------------------------------------------------------------------------


@dataclass
class Matched:
    """What a matching leaves: the student, and the seconds it took."""

    student: nn.Module
    seconds: float


class _Average:
    """A moving average of a network's weights, for a checkpoint."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = copy.deepcopy(module).requires_grad_(False), decay

    @torch.no_grad()
    def follow(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for mine, its in zip(self.module.parameters(), module.parameters()):
            mine.lerp_(its, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return self.module.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.module.load_state_dict(state)


class Matching:
    """One training by trajectory distribution matching.

    Args:
        spec: how.
        teacher: the frozen base model.
        student: the network that is trained; the fake one begins as its copy.
        shape: of a sample.
    """

    def __init__(self, spec: MatchingSpec, teacher: Denoiser, student: nn.Module, shape: tuple[int, ...]) -> None:
        check_matching(spec, teacher.schedule)
        self.spec, self.teacher, self.shape = spec, teacher, shape
        self.schedule = teacher.schedule
        student.requires_grad_(True).train()
        fake = copy.deepcopy(student)
        self.student, self.fake = (self._denoiser(m) for m in (student, fake))
        options: dict[str, Any] = {"betas": spec.betas, "weight_decay": spec.weight_decay}
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=spec.lr, **options)
        self.fake_optimizer = torch.optim.AdamW(fake.parameters(), lr=spec.fake_lr, **options)
        self.average = _Average(student, spec.average) if spec.average else None
        numbers = math.prod(shape)
        self.rounding = published_rounding(self.schedule, numbers) if spec.rounding is None else spec.rounding

    def _denoiser(self, module: nn.Module) -> Denoiser:
        return Denoiser(module, self.teacher.predicts, self.schedule, self.teacher.prompts)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        found: dict[str, Any] = {
            "student": self.student.module,
            "fake": self.fake.module,
            "optimizer": self.optimizer,
            "fake_optimizer": self.fake_optimizer,
        }
        return found | ({} if self.average is None else {"average": self.average})

    def _update(self, optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, self.spec.clip)
        optimizer.step()

    def _factor(self, i: int) -> float:
        spec = self.spec
        if i < spec.warmup:
            return (i + 1) / spec.warmup
        return 0.5 * (1 + math.cos(math.pi * (i - spec.warmup) / max(spec.iterations - spec.warmup, 1)))

    def step(self, i: int) -> dict[str, Tensor]:
        """One iteration; all draws are torch's generator's, which the loop seeds by the iteration."""
        spec, schedule = self.spec, self.schedule
        device = next(self.student.module.parameters()).device
        count = spec.batch_size
        label = torch.randint(self.teacher.prompts, (count,), device=device)
        noise = torch.randn(count, *self.shape, device=device)
        fresh = torch.randn(spec.steps, count, *self.shape, device=device)

        def student(x: Tensor, t: Tensor) -> Clean:
            return self.student.clean(x, t, label)

        states = roll_out(student, schedule, noise, fresh, spec.steps, spec.eta)

        def reach() -> tuple[Times, Reached]:
            times = draw_times(count, schedule.steps, spec.steps, spec.highest * schedule.steps // 1000, device)
            draws = torch.randn(2, count, *self.shape, device=device)
            return times, student_step(student, schedule, states, times, draws[0], draws[1], spec.eta)

        factor = self._factor(i)
        with torch.no_grad():
            times, reached = reach()
            real = self.teacher.clean(reached.noisy, times.noisy, label).x0 if spec.anchor else None
        fake = self.fake.clean(reached.noisy, times.noisy, label)
        first, second = (x.mean() for x in fake_terms(fake, reached, schedule, times.noisy, real))
        loss = first + spec.anchor * second
        if schedule.straight:
            loss = loss * (first.detach() <= spec.skip_above)
        self._update(self.fake_optimizer, loss, factor * spec.fake_lr)
        times, reached = reach()
        with torch.no_grad():
            real = self.teacher.clean(reached.noisy, times.noisy, label, spec.guidance).x0
            fake_x0 = self.fake.clean(reached.noisy, times.noisy, label).x0
        loss, _, divisor = student_loss(reached.x0, real, fake_x0, self.rounding, spec.most)
        self._update(self.optimizer, loss, factor * spec.lr)
        if self.average is not None:
            self.average.follow(self.student.module, i)
        return {"loss": loss.detach(), "fake": first.detach(), "to_teacher": divisor.mean()}

    def run(self, run: Run, stage: Stage) -> Matched:
        """Train to the end, resumably."""
        seconds = run.loop(stage, self.state, self.step, self.spec.iterations)
        module = self.student.module if self.average is None else self.average.module
        return Matched(module.eval().requires_grad_(False), seconds)


def matched_student(
    run: Run,
    stage: Stage,
    base: DenoiserSpec,
    spec: MatchingSpec,
    teacher: Denoiser,
    shape: tuple[int, ...],
    prepare: Callable[[nn.Module], None] | None = None,
    uses: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """The weights of a student that begins as the teacher's copy, as a stage that recipes with the same one share.

    Args:
        base: the teacher's spec.
        prepare: changes the copy before it is trained.
        uses: what that depends on.
    """

    def make() -> dict[str, Tensor]:
        student = copy.deepcopy(teacher.module).train()
        if prepare is not None:
            prepare(student)
        return state_on_cpu(Matching(spec, teacher, student, shape).run(run, stage).student)

    facts = {"teacher": teacher.module, "predicts": base.predicts, "schedule": base.schedule, "match": spec}
    return run.stage(stage, make, {**facts, "seed": run.seed, **(uses or {})})


def student_sampler(spec: MatchingSpec) -> SamplerSpec:
    """K steps as in training, without guidance."""
    return SamplerSpec(name="renoise", steps=spec.steps, eta=spec.eta)


def check_matching(spec: MatchingSpec, schedule: Schedule) -> None:
    """Raises `UserError` where student and schedule do not go together."""
    trajectory_times(schedule.steps, spec.steps)
    highest = spec.highest * schedule.steps // 1000
    if highest > schedule.steps:
        raise UserError(f"match.highest: times are drawn below 1,000 or less; given: {spec.highest}.")
    if (spec.steps - 1) * (schedule.steps // spec.steps) >= highest:
        raise UserError(
            f"match.highest: with {spec.steps} steps, times must be drawn up to more than "
            f"{(spec.steps - 1) * 1000 // spec.steps}; given: {spec.highest}."
        )
