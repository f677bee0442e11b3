"""`distill`, for models and loaders of your own, and `run_recipe`, for what a recipe describes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillhouse.config.messages import spell
from stillhouse.config.specs import TrainSpec
from stillhouse.devices import on_device
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.teachers import Teacher
from stillhouse.distillation.weighted import Objectives
from stillhouse.errors import UserError
from stillhouse.files import full_disk_reported
from stillhouse.training.display import Bars, Display
from stillhouse.training.engine import fit
from stillhouse.training.optimizers import trained_in_float32


def distill(
    teacher: nn.Module | Mapping[str, Any] | Any | None,
    student: nn.Module,
    train_loader: Any,
    objectives: Objectives = ("ce", "kd"),
    *,
    val_loader: Any = None,
    train: TrainSpec | Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    evaluate: Callable[[nn.Module, torch.device], dict[str, float]] | None = None,
    half_weights: bool = False,
    device: str | None = None,
) -> nn.Module:
    """Train `student` on the outputs of `teacher`, and return it (the same object, in evaluation mode).

    Args:
        teacher: any `nn.Module` that returns logits, a teacher of `stillhouse.distillation.teachers`, several by name,
            or None.
        student: any `nn.Module` that returns logits (B, C). One in half precision is trained in float32, as small
            updates of half-precision weights round to nothing; see `half_weights`.
        train_loader: batches of (input, label), or mappings with `input`, `label` and, for objectives that need it,
            `index`; your `DataLoader`, or a `stillhouse.data.Loader`.
        objectives: names (`"kd"`), mappings (`{"name": "kd", "temperature": 2, "weight": 0.9}`), `Objective`s, or
            (Objective, weight) pairs.
        val_loader: evaluated at the end of epochs (accuracy and calibration).
        train: options of `TrainSpec`, such as {"epochs": 30, "optimizer": {"name": "adamw", "lr": 1e-3}}.
        folder: for metrics.csv and checkpoints; an interrupted training resumes there. None: a temporary folder.
        evaluate: figures of your own, (student, device) -> {name: number}.
        half_weights: train a half-precision student as it is.
        device: the device to train on, such as cuda:1; None: the first GPU that torch sees, else the CPU.

    Raises:
        UserError: what does not fit together, such as other class counts, a tap that does not exist, or a device that
            is not there, before anything is trained; training that diverges.

    >>> import torch, stillhouse
    >>> data = [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(4)]
    >>> teacher, small = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    >>> student = stillhouse.distill(teacher, small, data, ["ce", "kd"], train={"epochs": 2}, progress=False)
    >>> student(torch.randn(2, 4)).shape
    torch.Size([2, 3])
    """
    from pydantic import ValidationError

    _check_types(teacher, student, objectives)

    from stillhouse.data import Loader, adapt
    from stillhouse.evaluation.classification import evaluate_classifier

    try:
        spec = train if isinstance(train, TrainSpec) else TrainSpec.model_validate(dict(train or {}))
    except ValidationError as error:
        raise spell(error, TrainSpec, "train") from None
    loader = train_loader if isinstance(train_loader, Loader) else adapt(train_loader, seed=seed, student=student)
    if evaluate is None and val_loader is not None:
        check = val_loader if isinstance(val_loader, Loader) else adapt(val_loader, seed=seed, student=student)
        evaluate = lambda model, device: evaluate_classifier(model, check, device)  # noqa: E731
    if spec.best is not None and evaluate is None:
        raise UserError("train.best needs a val_loader, or an `evaluate` of your own.")
    if not half_weights:
        trained_in_float32(student)
    module = Distillation(student, teacher, objectives, seed=seed)
    with tempfile.TemporaryDirectory() as temporary, on_device(device) as cpu:
        live = Bars() if progress else Display()
        try:
            where = Path(folder).expanduser() if folder is not None else Path(temporary)
            splits = {"train": loader}
            with full_disk_reported(str(where)):
                fit(module, loader, spec, folder=where, seed=seed, evaluate=evaluate, splits=splits, live=live, cpu=cpu)
        finally:
            live.close()
            module.close()
    return student.eval()


def run_recipe(
    recipe: str | Path | Mapping[str, Any],
    folder: str | Path,
    *,
    variant: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    data_root: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
    cpu: bool = False,
    device: str | None = None,
) -> dict[str, float]:
    """Run a recipe as `stillhouse run` does, and return the figures of its product; `stillhouse.load(folder)` gives the
    product.

    Args:
        recipe: a YAML file, or a mapping with the same keys.
        folder: of the run; an interrupted run resumes there.
        variant: one of the recipe's variants.
        overrides: values by dotted key, such as {"train.epochs": 3}, applied after the variant.
        data_root: folder that holds the data sets; default: STILLHOUSE_DATA.
        overwrite: start over in a folder that holds a run.
        cpu: use no GPU.
        device: the device to work on, such as cuda:1; None: the first GPU that torch sees, else the CPU.

    Raises:
        UserError: a mistake in the recipe, or a folder that holds a finished run or one of another recipe.

    >>> import stillhouse
    >>> recipe = {"data": "digits", "student": "stillhouse:mlp", "objectives": ["ce"], "train": {"epochs": 20}}
    >>> stillhouse.run_recipe(recipe, "runs/digits")["accuracy"]  # doctest: +SKIP
    """
    from stillhouse.runs.execution import execute
    from stillhouse.runs.recipe import load

    config = load(recipe, variant, overrides or {})
    root = None if data_root is None else str(data_root)
    live = Bars() if progress else Display()
    return execute(config, folder, data_root=root, live=live, overwrite=overwrite, cpu=cpu, device=device)


def _check_types(teacher: Any, student: Any, objectives: Any) -> None:
    """One sentence for what is no network and no list of objectives."""
    by_name = "; a network by name is built by stillhouse.models.build(ModelSpec(model=…)), or comes from a recipe"
    if not isinstance(student, nn.Module):
        raise UserError(
            "distill: the student must be an nn.Module; given: "
            f"{_shown(student)}{by_name if isinstance(student, str) else ''}."
        )
    named = teacher if isinstance(teacher, Mapping) else {} if teacher is None else {"teacher": teacher}
    for name, one in named.items():
        if not isinstance(one, nn.Module | Teacher):
            hint = by_name if isinstance(one, str) else ", or None"
            raise UserError(
                f"distill: the teacher{f' {name!r}' if isinstance(teacher, Mapping) else ''} must be an nn.Module or "
                f"a teacher of stillhouse; given: {_shown(one)}{hint}."
            )
    if isinstance(objectives, str | Mapping) or not isinstance(objectives, Sequence):
        raise UserError(f'distill: objectives must be a list, such as ["ce", "kd"]; given: {_shown(objectives)}.')


def _shown(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else f"a {type(value).__name__}"
