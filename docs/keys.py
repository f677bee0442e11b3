"""Option types as tables of keys: name, type in words, default, description; and the Markdown that all generated pages
are made of."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from stillhouse.config import specs
from stillhouse.methods.distillation import Config

SHARED = (
    specs.DataSpec,
    specs.ModelSpec,
    specs.CheckpointSpec,
    specs.UnlabelledSpec,
    specs.TeacherSpec,
    specs.InputSpec,
    specs.StoreSpec,
    specs.TrainSpec,
    specs.OptimizerSpec,
    specs.LRSchedule,
    specs.ObjectiveSpec,
    specs.WeightSpec,
    specs.ClaimSpec,
)


def recipe_reference() -> str:
    """What docs/recipes.md says of every key."""
    parts = ["## The keys of a recipe\n\nWhat is marked with * must be given.\n\n" + key_table(Config)]
    for model in SHARED:
        parts.append(f"## {model.__name__}\n\n{prose(' '.join((model.__doc__ or '').split()))}\n\n{key_table(model)}")
    return "\n".join(parts)


def key_table(model: type[BaseModel], without: Iterable[str] = ()) -> str:
    """A table of a model's keys: name, type, default, description."""
    rows = [
        (
            f"`{name}`" + ("*" if field.is_required() else ""),
            kind(field),
            default(field),
            prose(field.description or "", in_table=True),
        )
        for name, field in model.model_fields.items()
        if name not in without
    ]
    return table(("key", "type", "default", "what it is"), rows)


def kind(field: FieldInfo) -> str:
    """The type of a field in words, with its bounds."""
    words = {
        "Ge": ("ge", "at least"),
        "Gt": ("gt", "above"),
        "Le": ("le", "at most"),
        "Lt": ("lt", "below"),
        "MinLen": ("min_length", "length at least"),
    }
    bounds = [
        f"{word} {getattr(m, key):g}"
        for m in field.metadata
        for name, (key, word) in words.items()
        if type(m).__name__ == name
    ]
    return ", ".join([in_words(field.annotation), *bounds])


def in_words(annotation: Any) -> str:
    """A type as a user reads it: `float | None` is "number", a shared type is a link to its section."""
    plain = {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "true or false",
        NoneType: "null",
        Any: "anything",
    }
    if annotation in plain:
        return plain[annotation]
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return in_words(inner[0])
    if origin is Literal:
        return " \\| ".join(f"`{v}`" for v in inner)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(in_words(i) for i in inner if i is not NoneType))
    if origin is list:
        return f"list of {plural(inner[0])}"
    if origin is dict:
        return "mapping" if Any in inner else f"mapping of names to {plural(inner[1])}"
    if origin is tuple:
        return f"list of {plural(inner[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return f"`{getattr(annotation, '__name__', annotation)}`".replace("|", "\\|")


def plural(annotation: Any) -> str:
    return re.sub(r"(number|mapping)$", r"\1s", in_words(annotation))


def default(field: FieldInfo) -> str:
    """A field's default as it would stand in a recipe; empty where it must be given or is null."""
    value = None if field.is_required() else field.get_default(call_default_factory=True)
    if value is None:
        return ""
    held = plain(value)
    if isinstance(value, BaseModel) and not held:
        return "all defaults"
    return ("`" + (held if isinstance(held, str) else json.dumps(held, ensure_ascii=False)) + "`").replace("|", "\\|")


def plain(value: Any) -> Any:
    """Options as plain data, without those that have their defaults."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def table(headers: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [headers, ("---",) * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def prose(text: str, *, in_table: bool = False) -> str:
    """Plain text as Markdown: what is not in backticks is escaped."""
    parts = text.split("`")
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([*_<|])", r"\\\1", parts[i])
    out = "`".join(parts)
    return re.sub(r"(?<!\\)\|", r"\\|", out) if in_table else out
