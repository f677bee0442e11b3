"""`judge`: the one loop in which a network is judged. A task says how the network is called and read, and gives the
meter that collects figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from stillhouse.signals import Batch, Signals, evaluating, to_device


class Meter(Protocol):
    """Collects figures batch by batch, on the device: `add` reads nothing back to the host."""

    def add(self, batch: Batch, outputs: Signals) -> None: ...

    def figures(self) -> dict[str, float]:
        """All figures, by name. Raises `UserError` where there was nothing to judge by."""
        ...


class JudgedTask(Protocol):
    """What judging asks of a task (see `stillhouse.tasks.base.Task`)."""

    def call(self, model: nn.Module, batch: Batch, *, losses: bool = False) -> Any: ...

    def read(self, output: Any, batch: Batch) -> Signals: ...

    def meter(self, groups: Sequence[str]) -> Meter: ...

    def one(self, batch: Batch) -> Batch: ...

    def ready(self, model: nn.Module) -> Any: ...

    @property
    def prefers_chunks(self) -> bool: ...

    def chunked(self, models: Mapping[str, nn.Module], probe: Batch) -> Any: ...


M = TypeVar("M", bound=Meter)


def judge(
    task: JudgedTask,
    model: nn.Module,
    loader: Iterable[Batch],
    device: torch.device | str = "cpu",
    groups: Sequence[str] = (),
) -> dict[str, float]:
    """Figures of a network over a loader.

    Args:
        task: how the network is called, read and judged.
        model: on `device`; its mode (training or evaluation, submodule by submodule) is as before afterwards.
        loader: batches as the task has them.
        device: where batches are moved to.
        groups: of the task's figures.

    Raises:
        UserError: an unknown group, an empty loader, outputs that do not fit the labels, or NaN in the outputs.
    """
    return measured(task, model, loader, device, task.meter(groups)).figures()


def measured(task: JudgedTask, model: nn.Module, loader: Iterable[Batch], device: torch.device | str, meter: M) -> M:
    """The meter, after it was given the network's outputs for every batch."""
    task = task.ready(model)
    with evaluating(model):
        for number, batch in enumerate(loader):
            batch = to_device(batch, device)
            if number == 0 and task.prefers_chunks:
                chunked = task.chunked({"model": model}, batch)
                task = task if isinstance(chunked, str) else chunked
            meter.add(batch, task.read(task.call(model, batch), batch))
    return meter


def one_sample(batch: Batch) -> Batch:
    """The `input` of the first sample, as a batch of one."""
    x = batch["input"]
    return {
        "input": x[:1] if isinstance(x, Tensor) else {k: v[:1] if isinstance(v, Tensor) else v for k, v in x.items()}
    }
