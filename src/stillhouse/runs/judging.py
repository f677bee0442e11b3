"""The evaluator of students: the figures of its task on the test split, and its cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from stillhouse.errors import unknown
from stillhouse.evaluation import cost
from stillhouse.evaluation.judge import judge
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, to_device
from stillhouse.tasks.base import Task

QUALITY = "quality"  # all groups of the task
IN_TRAINING = ("step",)  # measured by the method, where the training is at hand


@evaluates("student")
def evaluate(product: Student, run: Run) -> dict[str, float]:
    """The figures of a run's student on its test split (on val or holdout where there is none), in the groups that the
    recipe's `evaluate` names."""
    loader = run.loader(*run.judging_data())
    groups = getattr(run.config, "evaluate", [*product.task.groups, "cost"])
    if "cost" in groups:
        for teacher in run.live_teachers:
            reader = teacher.readers()[0]
            facts = run.record.setdefault("teachers", {}).setdefault(
                reader.owner, {"model": type(teacher.model).__name__}
            )
            facts |= costs_of(teacher.model, teacher.task or product.task, reader.prepared(next(iter(loader))))
    return figures_of(product.module, product.task, loader, groups, product.task.weights_file(run.folder / "product"))


def check_groups(task: Task, groups: Sequence[str]) -> None:
    """Raises `UserError` for a group of figures that the task does not have."""
    known = [*task.groups, *task.slow_groups, QUALITY, "cost", *IN_TRAINING]
    for group in groups:
        if group not in known:
            raise unknown("evaluation group", group, known)


def figures_of(
    module: nn.Module, task: Task, loader: Iterable[Batch], groups: Sequence[str], weights: str | Path | None = None
) -> dict[str, float]:
    """Figures of a network by name, in the order of their groups.

    Args:
        module: the network, on the device where it is to be judged.
        loader: test batches.
        groups: of the task's, `quality` for all of them, and `cost`: `parameters`, `multiply_adds` (one sample),
            `latency_ms` (median of a batch of one, one CPU thread, or the GPU that the module is on) and, with
            `weights`, `file_bytes`.
        weights: the file of its weights.

    Raises:
        UserError: an unknown group, or what judging raises.
    """
    check_groups(task, groups)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    judged = [g for g in task.groups if g in groups or QUALITY in groups]
    out = judge(task, module, loader, device, judged) if judged else {}
    out |= task.own_figures(module, loader, groups)
    if "cost" in groups:
        out |= costs_of(module, task, next(iter(loader)))
        if weights is not None:
            out["file_bytes"] = cost.file_size(weights)
    return out


def costs_of(module: nn.Module, task: Task, batch: Batch) -> dict[str, float]:
    """`parameters`, `multiply_adds` and `latency_ms` of a network for the first sample of a batch."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    sample = to_device(task.one(batch), device)
    return {
        "parameters": cost.parameters(module),
        "multiply_adds": cost.multiply_adds(module, sample, task),
        "latency_ms": cost.latency(module, sample, task)["median"],
    }
