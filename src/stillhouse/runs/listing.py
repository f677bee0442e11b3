"""What `stillhouse methods` prints: all methods and objectives, a line each, or one with its keys and evidence. A list
imports no torch."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from stillhouse import catalog
from stillhouse.catalog import Card

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

HEADINGS = {"method": "Methods (method: NAME)", "objective": "Objectives (listed under objectives:)"}


def all_methods() -> Iterator[str]:
    """The lines of the whole catalogue, cut to the terminal."""
    room = max(shutil.get_terminal_size((150, 24)).columns, 80) - 27
    for kind, heading in HEADINGS.items():
        yield heading
        for card in catalog.list_methods():
            if card.kind == kind:
                summary = card.title.partition(": ")[2] or card.title
                summary = summary[0].upper() + summary[1:]
                yield (
                    f"  {', '.join(card.provides):<24} {summary if len(summary) <= room else summary[: room - 1] + '…'}"
                )
    yield "One of them: stillhouse methods NAME"


def one_method(card: Card) -> Iterator[str]:
    """The lines of one card: what it is, its options with their defaults, its recipe where there is one here."""
    yield card.title
    for key, value in card.fields.items():
        yield f"  {key:<9} {value}"
    if card.text:
        yield f"\n{card.text}"
    if card.kind == "objective":
        for name in card.provides:
            cls = catalog.objective(name)
            words = argument_words(cls.__doc__ or "")
            yield f"\nOptions of {name} (* must be given):"
            for key, field in catalog.options(cls).model_fields.items():
                yield _line(key, field, words.get(key, ""))
    else:
        yield (
            f"\nKeys of a recipe with method: {card.slug}, besides name, seed and variants (* must be given; "
            f"`stillhouse schema {card.slug}` has the types):"
        )
        yield from _keys(catalog.method(card.slug).Config)
    recipe = next(Path("recipes").rglob(f"{card.slug}.yaml"), None)
    if recipe is not None:
        yield f"\nTry it: stillhouse run {recipe}"


def evidence(card: Card) -> dict[str, Any] | None:
    """What was measured, where `evidence/` is in this folder."""
    path = Path("evidence") / f"{card.slug}.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return found


def argument_words(docstring: str) -> dict[str, str]:
    """Name -> words, from the `Args:` of a docstring; `a, b: …` describes both.

    >>> argument_words("Loss.\\n\\n    Args:\\n        a, b: of both\\n            sides.\\n")
    {'a': 'of both sides.', 'b': 'of both sides.'}
    """
    block = re.search(r"Args:\n((?:[ \t]+.*\n?|\n)+)", docstring)
    out: dict[str, str] = {}
    names: list[str] = []
    for line in block.group(1).splitlines() if block else []:
        start = re.match(r" {8}(\w+(?:, \w+)*): (.*)", line)
        if start:
            names = start.group(1).split(", ")
            out.update(dict.fromkeys(names, start.group(2)))
        elif line.startswith(" " * 9) and names:
            out.update({n: f"{out[n]} {line.strip()}" for n in names})
        elif line.strip():
            break
    return out


def _keys(config: type[BaseModel], path: str = "", seen: dict[type[BaseModel], str] | None = None) -> Iterator[str]:
    """A line a key; after them, those of option types of the method's own, with their dotted names, as --set takes
    them."""
    from stillhouse.config.specs import MethodConfig

    seen = {} if seen is None else seen
    below = []
    for name, field in config.model_fields.items():
        if not path and name in MethodConfig.model_fields:
            continue
        own = [m for m in _models(field.annotation) if m.__module__ != "stillhouse.runs.recipe"]
        if own and own[0] not in seen and get_origin(field.annotation) is not list:
            seen[own[0]] = path + name
            below.append((own[0], path + name))
        yield _line(path + name, field, field.description or "", seen.get(own[0]) if own else None)
    for model, place in below:
        yield from _keys(model, f"{place}.", seen)


def _line(key: str, field: FieldInfo, words: str, described: str | None = None) -> str:
    """`key (type, default)  words`; `described`: the key under which the keys of its type are listed."""
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    kind = (
        _kind(field.annotation)
        if described is None
        else "keys below"
        if described == key
        else f"keys as of {described}"
    )
    plain = isinstance(default, bool | int | float | str) or (isinstance(default, list | tuple | dict) and default)
    shown = f", {json.dumps(default, default=str)}" if plain and len(str(default)) < 40 else ""
    head = f"  {key}{'*' if field.is_required() else ''} ({kind}{shown})"
    width = min(max(shutil.get_terminal_size((150, 24)).columns, 80), 150)
    return textwrap.fill(
        f"{head}  {words}".rstrip(), width, subsequent_indent=" " * 6, break_long_words=False, break_on_hyphens=False
    )


def _kind(annotation: Any) -> str:
    """A type as a reader of recipes knows it."""
    plain = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything"}
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0])
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_kind(i) for i in inner if i is not type(None)))
    if origin in (list, tuple):
        return f"list of {_kind(inner[0])}" if inner else "list"
    if origin is dict:
        return "mapping"
    if _models(annotation):
        return annotation.__name__
    return plain.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The option types that an annotation holds."""
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for inner in get_args(annotation) for m in _models(inner)]
