"""`WeightedObjective`: an objective with its weight and its name in logs; and how a recipe's entry becomes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from stillhouse import catalog
from stillhouse.config.messages import spell
from stillhouse.config.specs import ObjectiveSpec, WeightSpec
from stillhouse.distillation.objective import Objective, WeightSchedule
from stillhouse.errors import UserError
from stillhouse.training.context import Progress


@dataclass(frozen=True)
class WeightedObjective:
    """An objective in a distillation: its weight (a number, or a schedule) and its name in logs."""

    objective: Objective
    weight: float | WeightSchedule
    label: str

    def at(self, progress: Progress) -> float:
        return self.weight.at(progress) if isinstance(self.weight, WeightSchedule) else self.weight


Objectives = Sequence[
    str | Mapping[str, Any] | ObjectiveSpec | Objective | tuple[Objective, float | WeightSchedule] | WeightedObjective
]
"""Names ("kd"), mappings ({"name": "kd", "temperature": 2}), entries of a recipe, objectives, or (objective, weight)
pairs."""


def objective_from_spec(spec: str | Mapping[str, Any] | ObjectiveSpec) -> Any:
    """A recipe entry as a `stillhouse.distillation.weighted.WeightedObjective` objective."""
    if not isinstance(spec, ObjectiveSpec):
        try:
            spec = ObjectiveSpec.model_validate(spec)
        except ValidationError as error:
            raise spell(error, ObjectiveSpec, "objective") from None
    check_objective(spec, "objective", (spec.name,))
    cls = catalog.objective(spec.name)
    objective = cls(**spec.arguments)
    objective.teacher = spec.teacher
    weight: Any = spec.weight if spec.weight is not None else cls.default_weight
    if isinstance(weight, WeightSpec):
        weight = WeightSchedule(**weight.model_dump())
    name: str = getattr(cls, "name", spec.name)
    return WeightedObjective(objective, weight, spec.label or name)


def check_objective(spec: ObjectiveSpec, where: str, path: tuple[Any, ...]) -> None:
    """Check one objective's options by its own file, and fill in their defaults."""
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
