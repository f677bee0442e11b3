"""SWAD: the average of all weights between the first and the last of a flat valley of the validation loss.

Cha et al., "SWAD: Domain Generalization by Seeking Flat Minima", NeurIPS 2021 (arXiv 2102.08604), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def valley(
    losses: Sequence[float], n_converge: int = 3, n_tolerance: int = 6, tolerance: float = 0.3
) -> tuple[int, int] | None:
    """The first and last evaluation of the flat valley, both inclusive; None where the loss never stopped falling.

    It begins at the first evaluation whose loss is the smallest of itself and the n_converge - 1 after it, and ends
    before the first at which the loss of n_tolerance evaluations in a row is above the threshold, (1 + tolerance) times
    the mean of those n_converge.

    >>> valley([5, 4, 3, 1, 2, 2, 1, 9, 9, 9, 9, 9, 9])
    (3, 6)
    """
    for start in range(len(losses) - n_converge + 1):
        window = losses[start : start + n_converge]
        if losses[start] <= min(window):
            threshold = (1 + tolerance) * sum(window) / n_converge
            after = range(start + 1, len(losses) - n_tolerance + 1)
            dead = next((i for i in after if min(losses[i : i + n_tolerance]) > threshold), len(losses))
            last = max(i for i in range(start, dead) if losses[i] <= threshold or i == start)
            return start, last
    return None


class DenseAverage(nn.Module):
    """The running mean of a network's weights over each segment between two evaluations, with the loss at its end.

    It is in the checkpoints of the module that holds it. Memory is one copy of the weights a segment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.segments: list[State] = []
        self.losses: list[float] = []
        self._mean: State = {}
        self._count = 0

    @torch.no_grad()
    def add(self, network: nn.Module) -> None:
        """Take the weights after an optimiser step."""
        self._count += 1
        for name, value in network.state_dict().items():
            if name not in self._mean or not value.is_floating_point():
                self._mean[name] = value.detach().clone()
            else:
                self._mean[name] += (value - self._mean[name]) / self._count

    def evaluated(self, loss: float) -> None:
        """End the segment at an evaluation."""
        if self._count:
            self.segments.append(self._mean)
            self.losses.append(loss)
            self._mean, self._count = {}, 0

    def result(self, **options: Any) -> State | None:
        """The mean over the segments of the `valley`, whose options these are; the last segment where there is none;
        None before the first evaluation."""
        if not self.segments:
            return None
        found = valley(self.losses, **options)
        used = self.segments[-1:] if found is None else self.segments[found[0] : found[1] + 1]
        return {
            name: torch.stack([s[name] for s in used]).mean(0) if value.is_floating_point() else used[-1][name]
            for name, value in used[-1].items()
        }

    def get_extra_state(self) -> dict[str, Any]:
        return {"segments": self.segments, "losses": self.losses, "mean": self._mean, "count": self._count}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.segments, self.losses = list(state["segments"]), list(state["losses"])
        self._mean, self._count = dict(state["mean"]), int(state["count"])
