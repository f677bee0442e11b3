"""The hybrid sampler: a base model takes the first steps, its few-step student the rest; and the clean samples that
both see on the way."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.functional.diffusion import Denoise, Sampler, sample


def stop_index(base: Sequence[int], student: Sequence[int], begin: int) -> int:
    """How many steps the base takes before the student begins at its step `begin`: up to the base's step that is
    nearest to it, the first of equals.

    Args:
        base, student: steps of both samplers, falling.
        begin: 0: the student takes all; as many as the student has: the base takes all of its own.

    Raises:
        UserError: a student that would begin after its last step.
    """
    if not 0 <= begin <= len(student):
        raise UserError(f"hybrid.begin: the student has steps 0 to {len(student) - 1}; given: {begin}.")
    if begin == 0:
        return 0
    if begin == len(student):
        return len(base)
    distances = [abs(t - student[begin]) for t in base]
    found = distances.index(min(distances))
    step = (base[0] - base[-1]) / max(len(base) - 1, 1)
    if min(distances) > step / 2:
        warnings.warn(
            f"The base's nearest step to {student[begin]}, where the student begins, is {base[found]}: the sample has "
            "another amount of noise there than the student expects.",
            stacklevel=2,
        )
    return found


def check_states(base: Sampler, student: Sampler) -> None:
    """Raises `UserError` where a student cannot continue the base's samples."""
    if base.scaled != student.scaled or base.schedule.straight != student.schedule.straight:
        kinds = ["x0 + sigma eps" if s.scaled else "a x0 + s eps" for s in (base, student)]
        raise UserError(
            f"The samplers of base ({base.name}: samples are {kinds[0]}) and student ({student.name}: {kinds[1]}) do "
            "not agree in how samples hold noise; take two of one kind."
        )


class Drawn(NamedTuple):
    """A hybrid's sample, and where it was handed over; the clean samples (steps, B, ...) that base and student saw."""

    x: Tensor
    switched: Tensor
    base_sees: Tensor
    student_sees: Tensor


def hybrid_sample(
    base: Denoise,
    student: Denoise,
    base_sampler: Sampler,
    student_sampler: Sampler,
    noise: Tensor,
    begin: int,
    *,
    stop: int | None = None,
    fresh: Callable[[], Tensor] | None = None,
) -> Drawn:
    """Samples by the base up to the student's step `begin`, then by the student, without new noise in between.

    Args:
        base, student: the networks with their prompts and guidance.
        noise: (B, ...) standard normal.
        begin: the student's first step; 0: the student alone; as many as it has: the base alone.
        stop: how many steps the base takes; None: see `stop_index`.
        fresh: the noise of the next step that draws some, in order; default: torch's generator.

    Raises:
        UserError: samplers that do not agree.
    """
    check_states(base_sampler, student_sampler)
    taken = stop_index(base_sampler.steps, student_sampler.steps, begin) if stop is None else stop
    seen: tuple[list[Tensor], list[Tensor]] = ([], [])
    more = None if fresh is None else (lambda i: fresh())
    x = (base_sampler if taken else student_sampler).start(noise)
    x = sample(base, base_sampler, x, end=taken, noise=more, seen=lambda i, x0: seen[0].append(x0))
    switched = x
    x = sample(student, student_sampler, x, begin=begin, noise=more, seen=lambda i, x0: seen[1].append(x0))
    empty = noise.new_zeros((0, *noise.shape))
    stacked = [torch.stack(found) if found else empty for found in seen]
    return Drawn(x, switched, stacked[0], stacked[1])


def correlations(seen: Tensor, final: Tensor) -> Tensor:
    """(steps,) the mean over samples of the correlation of what was seen (steps, B, ...) with the end (B, ...).

    What all samples have in common is taken from both first: what is left is what was decided of a sample.
    """
    a, b = seen.flatten(2).double(), final.flatten(1).double()
    a, b = a - a.mean(1, keepdim=True), b - b.mean(0, keepdim=True)
    norms = (a.square().sum(-1) * b.square().sum(-1)).sqrt().clamp_min(1e-12)
    return ((a * b).sum(-1) / norms).mean(-1)


def variation(samples: Tensor) -> float:
    """The mean distance of two samples (B, ...), B > 1."""
    return float(torch.pdist(samples.flatten(1).double().cpu()).mean())
