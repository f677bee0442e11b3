"""The parts of a recipe that something elsewhere defines, checked before anything runs: objectives, optimisers, and networks by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from stillhouse.errors import UserError
from stillhouse.recipe import ModelSpec, ObjectiveSpec, OptimizerSpec, TeacherSpec
from stillhouse.sentences import spell, unknown_key

Path = tuple[Any, ...]


def check(config: BaseModel, where: str, path: Path = ()) -> None:
    """Check every such part of a config, in place: objectives get the defaults of their options and their published weight.

    Args:
        where: what the sentence of an error begins with, such as the recipe's file.
        path: where in the recipe the config stands.

    Raises:
        UserError: an objective, optimiser or network that does not exist, or an option that it does not have.
    """
    for name in type(config).model_fields:
        for here, part in _parts(getattr(config, name), (*path, name)):
            if isinstance(part, ObjectiveSpec):
                check_objective(part, where, here)
                continue
            if isinstance(part, OptimizerSpec):
                _check_optimizer(part, where, here)
            elif isinstance(part, ModelSpec | TeacherSpec) and part.model is not None:
                _check_network(part.model, part.options, where, here)
            check(part, where, here)


def _parts(value: Any, path: Path) -> Iterable[tuple[Path, BaseModel]]:
    """The models that a field holds, alone, in a list or by name, and where."""
    held = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [(None, value)]
    return [((*path, key) if key is not None else path, part) for key, part in held if isinstance(part, BaseModel)]


def _check_network(model: str, options: dict[str, Any], where: str, path: Path) -> None:
    from stillhouse import models

    try:
        models.check(model, options)
    except UserError as error:
        raise UserError(f"{where}: {'.'.join(map(str, path))}: {error}") from None


def _check_optimizer(spec: OptimizerSpec, where: str, path: Path) -> None:
    import inspect

    from stillhouse.optimizers import optimizer_class

    try:
        valid = [p for p in inspect.signature(optimizer_class(spec.name)).parameters if p != "params"]
    except UserError as error:
        raise UserError(f"{where}: {'.'.join(map(str, path))}.name: {error}") from None
    for key in spec.arguments():
        if key not in valid:
            raise UserError(f"{where}: {unknown_key(key, ['name', *valid], path, f' for {spec.name}')}")


def check_objective(spec: ObjectiveSpec, where: str, path: Path) -> None:
    """Check one objective's options by its own file, and fill in their defaults."""
    from stillhouse import catalog

    try:
        found = catalog.objective(spec.name)
    except UserError as error:
        raise UserError(f"{where}: {'.'.join(map(str, path))}: {error}") from None
    model = catalog.options(found)
    try:
        checked = model.model_validate(spec.arguments)
    except ValidationError as error:
        raise spell(error, model, where, path, keys=ObjectiveSpec.model_fields) from None
    if spec.model_extra is not None:
        spec.model_extra.update({k: v for k in type(checked).model_fields if (v := getattr(checked, k)) is not None})
    if spec.weight is None:
        spec.weight = found.default_weight
