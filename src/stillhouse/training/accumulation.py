"""The gradient of an optimiser step as that of one mean over all its samples, whatever batch and process each of them
lies in.

A loss is a mean over its batch. Batches of unequal size, within a step or over processes, would therefore weigh their
samples unequally. `StepMean` multiplies each loss by its batch's size before the backward pass, and divides the
gradients by the sum of the sizes before the optimiser's step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.signals import Batch


class StepMean:
    """Weighs the batches of an optimiser step by their sizes.

    Args:
        reference: a usual size, the same for all batches of a step and in all processes: losses and gradients keep
            their usual magnitude.
        processes: how many train together; their gradients are averaged.
        reduce: sums a tensor over processes.

    >>> mean, weight = StepMean(), torch.nn.Parameter(torch.zeros(1))
    >>> for batch in ([1.0, 2.0, 3.0], [8.0]):
    ...     mean.weigh((weight * torch.tensor(batch)).mean() / 2, len(batch)).backward()
    >>> mean.finish([weight], averaged=2)
    >>> weight.grad
    tensor([3.5000])
    """

    def __init__(
        self, reference: float | Tensor = 1.0, processes: int = 1, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.reference, self._processes, self._reduce = reference, processes, reduce
        self._total: float | Tensor = 0.0

    def weigh(self, loss: Tensor, size: float | Tensor) -> Tensor:
        """The loss, a mean over `size` samples (or tokens) in this process, as its share of the step."""
        self._total = self._total + size
        unchanged = not isinstance(size, Tensor) and size == self.reference
        return loss if unchanged else loss * (size / self.reference)

    def finish(self, parameters: Sequence[nn.Parameter], averaged: int = 1, shared: bool = False) -> None:
        """Turn the gradients, once reduced, into those of the mean over all samples of the step, in place.

        Args:
            parameters: all that are trained.
            averaged: by how many batches each loss had been divided already.
            shared: whether the sizes were means over processes already.
        """
        total, self._total = self._total, 0.0
        if self._reduce is not None and self._processes > 1 and not shared:
            total = (
                self._reduce(torch.as_tensor(total, dtype=torch.float32, device=parameters[0].device)) / self._processes
            )
        factor = averaged * self.reference / total
        if isinstance(factor, Tensor) or factor != 1.0:
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, factor)


def samples(batch: Batch) -> int:
    """How many samples a batch holds: the length of its label, or of the first tensor in its input."""
    for value in (batch.get("label"), batch.get("input")):
        found = _first(value)
        if found is not None:
            return len(found)
    return 1


def _first(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value if value.ndim else None
    if isinstance(value, Mapping):
        return next((found for v in value.values() if (found := _first(v)) is not None), None)
    return None
