"""`load`: a recipe, a file or a mapping, as the config of its method. Every objective, optimiser and network that it
names is checked before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from stillhouse import catalog
from stillhouse.config.messages import spell, unknown_key
from stillhouse.config.reading import beside_recipe, dump, parse_sets, read_yaml, resolve, set_key
from stillhouse.config.specs import DataSpec, MethodConfig, ModelSpec, ObjectiveSpec, OptimizerSpec, TeacherSpec
from stillhouse.errors import UserError
from stillhouse.runs.claims import read_claims

__all__ = ["beside_recipe", "check", "dump", "load", "parse_sets", "read_yaml", "resolve", "set_key", "validate"]

KeyPath = tuple[Any, ...]
"""Where in a recipe something stands: keys and positions in lists."""


def validate(tree: Mapping[str, Any], where: str = "recipe") -> MethodConfig:
    """A resolved recipe as its method's `Config`; only the files of the method and the objectives it names are
    imported."""
    method = tree.get("method", "distillation")
    if not isinstance(method, str):
        raise UserError(f"{where}: 'method' must be a method's name; given: {method!r}.")
    try:
        found = catalog.method(method)
    except UserError as error:
        raise UserError(f"{where}: method: {error}") from None
    try:
        valid = found.Config.model_validate(dict(tree))
    except ValidationError as error:
        raise spell(error, found.Config, where) from None
    _refuse_unlabelled(valid, where, method, ("data",) if found.unlabelled else None)
    check(valid, where)
    return valid


def load(
    recipe: str | Path | Mapping[str, Any], variant: str | None = None, sets: Sequence[str] | Mapping[str, Any] = ()
) -> MethodConfig:
    """Read, resolve and validate a recipe. Its name defaults to the file's, or to `recipe`, with the variant.

    Args:
        recipe: a file, or a mapping with the same keys.
        variant: one of the recipe's variants.
        sets: overrides, as `["train.epochs=3"]` or `{"train.epochs": 3}`.
    """
    if isinstance(recipe, Mapping):
        given, folder, name, where = recipe, Path(), "recipe", "recipe"
    else:
        path = Path(recipe)
        given, folder, name, where = read_yaml(path), path.parent, path.stem, str(path)
    read_claims(given, where)
    overrides = sets if isinstance(sets, Mapping) else parse_sets(sets)
    tree = beside_recipe(resolve(given, variant, overrides, where=where), folder)
    if tree.get("name") is None:
        tree["name"] = name + (f"-{variant}" if variant else "")
    return validate(tree, where=where)


def check(config: BaseModel, where: str, path: KeyPath = ()) -> None:
    """Check every such part of a config, in place: objectives get the defaults of their options and their published
    weight.

    Args:
        where: what the sentence of an error begins with, such as the recipe's file.
        path: where in the recipe the config stands.

    Raises:
        UserError: an objective, optimiser or network that does not exist, or an option that it does not have.
    """
    for name in type(config).model_fields:
        for here, part in _parts(getattr(config, name), (*path, name)):
            if isinstance(part, ObjectiveSpec):
                from stillhouse.distillation.weighted import check_objective

                check_objective(part, where, here)
                continue
            if isinstance(part, OptimizerSpec):
                _check_optimizer(part, where, here)
            elif isinstance(part, ModelSpec | TeacherSpec) and part.model is not None:
                _check_network(part.model, part.options, where, here)
            check(part, where, here)


def _refuse_unlabelled(config: BaseModel, where: str, method: str, read: KeyPath | None, path: KeyPath = ()) -> None:
    """Raises `UserError` for a data set with `unlabelled` anywhere but where the method reads it."""
    for name in type(config).model_fields:
        for here, part in _parts(getattr(config, name), (*path, name)):
            if isinstance(part, DataSpec) and part.unlabelled is not None and here != read:
                key = ".".join(map(str, here))
                raise UserError(f"{where}: {key}.unlabelled does nothing for the method '{method}'; leave it out.")
            _refuse_unlabelled(part, where, method, read, here)


def _parts(value: Any, path: KeyPath) -> Iterable[tuple[KeyPath, BaseModel]]:
    """The models that a field holds, alone, in a list or by name, and where."""
    values = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [(None, value)]
    )
    return [((*path, key) if key is not None else path, part) for key, part in values if isinstance(part, BaseModel)]


def _check_network(model: str, options: dict[str, Any], where: str, path: KeyPath) -> None:
    from stillhouse import models

    try:
        models.check(model, options)
    except UserError as error:
        raise UserError(f"{where}: {'.'.join(map(str, path))}: {error}") from None


def _check_optimizer(spec: OptimizerSpec, where: str, path: KeyPath) -> None:
    import inspect

    from stillhouse.training.optimizers import check_optimizer, optimizer_class

    try:
        valid = [p for p in inspect.signature(optimizer_class(spec.name)).parameters if p != "params"]
    except UserError as error:
        raise UserError(f"{where}: {'.'.join(map(str, path))}.name: {error}") from None
    for key in spec.arguments():
        if key not in valid:
            raise UserError(f"{where}: {unknown_key(key, ['name', *valid], path, f' for {spec.name}')}")
    try:
        check_optimizer(spec.name, spec.arguments())
    except UserError as error:
        raise UserError(f"{where}: {'.'.join(map(str, path))}: {error}") from None
