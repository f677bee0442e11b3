"""Pixels under an optimiser whose rate falls along a cosine, as images are recovered from networks (SRe2L and its kin),
and what that costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stillhouse.evaluation import cost
from stillhouse.functional.augmentation import Strength, all_of, apply, groups_of
from stillhouse.runs.run import Run
from stillhouse.synthetic.synthesis import TensorState


@dataclass
class Cost:
    """What descents cost: seconds and iterations add up, of the bytes that an iteration holds the most counts."""

    seconds: float = 0.0
    iterations: int = 0
    peak: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.iterations + other.iterations, max(self.peak, other.peak))

    def figures(self) -> dict[str, float]:
        """As figures of a product."""
        found = {
            "distil_seconds": self.seconds,
            "distil_iterations": float(self.iterations),
            "distil_peak_mb": self.peak / 1e6,
        }
        return found | ({"distil_seconds_per_iteration": self.seconds / self.iterations} if self.iterations else {})


def class_batches(classes: int, most: int | None) -> Iterator[tuple[slice, str]]:
    """The classes of each descent, at most `most` at a time (None: all at once), and how its name ends."""
    if most is None or most >= classes:
        yield slice(0, classes), ""
        return
    for first in range(0, classes, most):
        yield slice(first, min(first + most, classes)), f".{first}"


def descend(
    run: Run,
    name: str,
    pixels: nn.Parameter,
    lr: float,
    iterations: int,
    loss: Callable[[int], Mapping[str, Tensor]],
    *,
    plain: bool = False,
    after: Callable[[], None] | None = None,
) -> Cost:
    """Minimise over the pixels, in place, by the run's loop (so that a killed run resumes).

    The rate of step t is lr (1 + cos(pi t / iterations)) / 2.

    Args:
        name: of the loop.
        loss: iteration -> named terms, of which `loss` is minimised.
        plain: the plain gradient, not Adam with betas 0.5, 0.9.
        after: called after each step.

    Returns:
        Its cost; the memory is that of the first iteration's forward and backward.
    """
    if not iterations:
        return Cost()
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD([pixels], lr) if plain else torch.optim.Adam([pixels], lr, betas=(0.5, 0.9))
    )
    peak = torch.zeros((), dtype=torch.int64)

    def one(i: int) -> dict[str, Tensor]:
        found = loss(i)
        optimizer.zero_grad()
        found["loss"].backward()
        return {k: v.detach() for k, v in found.items()}

    def step(i: int) -> Mapping[str, Tensor]:
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * i / iterations))
        found: dict[str, Tensor] = {}
        if i == 0:
            peak.fill_(cost.peak_of_tensors(lambda: found.update(one(0)), pixels.device))
        else:
            found = one(i)
        optimizer.step()
        if after is not None:
            after()
        return found

    cost.peak_of_tensors(
        lambda: None, pixels.device
    )  # the profiler's own start, a second, is no cost of the first iteration
    seconds = run.loop(
        name, {"pixels": TensorState(pixels), "optimizer": optimizer, "peak": TensorState(peak)}, step, iterations
    )
    return Cost(seconds, iterations, int(peak))


def batch_view(x: Tensor, augment: str, jitter: int, drawn: torch.Generator, area: float = 0.08) -> Tensor:
    """Images (B, C, H, W) as a step sees them: one draw of all of `augment` for the whole batch, then one shift of 0 to
    `jitter` pixels down and right.

    What leaves the picture comes in on the other side. `area` is the smallest share of the image that a resized crop
    keeps.
    """
    x = apply(x, all_of(groups_of(augment), 1, (x.shape[-2], x.shape[-1]), drawn, Strength(area=area)))
    return torch.roll(x, torch.randint(0, jitter + 1, (2,), generator=drawn).tolist(), (2, 3))
