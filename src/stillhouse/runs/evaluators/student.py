"""The evaluator of students: accuracy, calibration and cost of a trained classifier on the test set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from stillhouse.errors import unknown
from stillhouse.evaluation import classification, cost
from stillhouse.runs.evaluators import evaluates
from stillhouse.signals import Batch, to_device

if TYPE_CHECKING:
    from stillhouse.runs.products import Student
    from stillhouse.runs.run import Run

GROUPS = (*classification.GROUPS, "cost")
IN_TRAINING = ("step",)  # measured by the method, where the training is at hand


@evaluates("student")
def judge(product: Student, run: Run) -> dict[str, float]:
    """The figures of a run's student on its test split (on val or holdout where there is none), in the groups that the recipe's `evaluate` names."""
    loader = run.loader(*run.judging_data())
    return evaluate_student(
        product.module, loader, next(iter(loader)), getattr(run.config, "evaluate", GROUPS), run.folder / "product" / "model.safetensors"
    )


def evaluate_student(
    module: nn.Module, loader: Iterable[Batch], example_batch: Batch, groups: Sequence[str] = GROUPS, folder: str | Path | None = None
) -> dict[str, float]:
    """Figures of a student by name, in the order of their groups.

    Args:
        module: the student, on the device where it is to be judged.
        loader: test batches with `input` and `label` (B,).
        example_batch: any batch; its first sample is what cost is measured on.
        groups: of `accuracy`, `calibration` (see `evaluate_classifier`) and `cost`: `parameters`, `multiply_adds` (one sample), `latency_ms`
            (median of a batch of one, one CPU thread, or the GPU that the module is on) and, with a folder, `file_bytes`.
        folder: where the product is saved.

    Raises:
        UserError: an unknown group, or what `evaluate_classifier` raises.
    """
    for group in groups:
        if group not in (*GROUPS, *IN_TRAINING):
            raise unknown("evaluation group", group, [*GROUPS, *IN_TRAINING])
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    judged = [g for g in groups if g in classification.GROUPS]
    out = classification.evaluate_classifier(module, loader, device, judged) if judged else {}
    if "cost" in groups:
        example = {"input": to_device(example_batch["input"], device)}
        out["parameters"] = cost.parameters(module)
        out["multiply_adds"] = cost.multiply_adds(module, example)
        out["latency_ms"] = cost.latency(module, example)["median"]
        if folder is not None:
            out["file_bytes"] = cost.file_size(folder)
    return out
