"""What is wrong with a recipe, in sentences: pydantic's errors with the key's path, what is wanted, what was given, and
the nearest valid name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from stillhouse.errors import UserError, nearest

_WANTED = {  # by the start of pydantic's name of the error
    "int": "must be a whole number",
    "float": "must be a number",
    "finite_number": "must be a finite number",
    "bool": "must be true or false",
    "string": "must be text",
    "list": "must be a list",
    "tuple": "must be a list",
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be above {gt:g}",
    "less_than_equal": "must be at most {le:g}",
    "less_than": "must be below {lt:g}",
    "too_short": "must have at least {min_length} in it",
    "too_long": "must have at most {max_length} in it",
    "literal_error": "must be {expected}",
}


def spell(
    error: ValidationError, model: type[BaseModel], where: str, path: Sequence[Any] = (), keys: Iterable[str] = ()
) -> UserError:
    """A validation error of a model as sentences, one for each mistake.

    Args:
        where: what the sentences begin with, such as the recipe's file.
        path: where in the recipe the model stands.
        keys: valid there besides the model's own.
    """
    places = [_place(item["loc"], model) for item in error.errors()]
    lines: dict[str, tuple[list[str], str]] = {}  # a sentence's beginning -> what is wanted there, and its end
    for item, (here, owner) in zip(error.errors(), places):
        if any(len(other) > len(here) and other[: len(here)] == here for other, _ in places):
            continue  # of a union, the alternative that went deeper is the one that was meant
        dotted = ".".join(map(str, [*path, *here]))
        kind = item["type"]
        if kind == "extra_forbidden":
            valid = [*_keys(owner), *(keys if len(here) == 1 else ())]
            lines[f"{where}: {unknown_key(str(here[-1]), valid, [*path, *here[:-1]])}"] = [], ""
        elif kind == "value_error":
            lines[f"{where}: {dotted + ': ' if dotted else ''}{_ended(str(item['ctx']['error']))}"] = [], ""
        elif kind == "missing":
            lines[f"{where}: '{dotted}' is missing."] = [], ""
        else:
            wanted, _ = lines.setdefault(
                f"{where}: '{dotted}' ", ([], f"; given: {shown(item.get('input'))}.{_meant(item)}")
            )
            wanted += [text for text in [_wanted(item, owner)] if text not in wanted]
    return UserError("\n".join(start + _joined(wanted) + end for start, (wanted, end) in lines.items()))


def shown(value: Any) -> str:
    """A value as a recipe would hold it, cut where it is long.

    >>> shown("many"), shown(None), shown(True)
    ("'many'", 'null', 'true')
    """
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) < 60 else text[:57] + "…"


def unknown_key(key: str, valid: Sequence[str], path: Sequence[Any], owner: str = "") -> str:
    """`unknown key 'a.b'; did you mean 'a.c'?`"""
    return f"unknown key '{'.'.join(map(str, [*path, key]))}'{owner}; {_hint(key, valid, path)}"


def _hint(key: str, valid: Sequence[str], path: Sequence[Any]) -> str:
    close = nearest(key, valid, 1)
    if close:
        return f"did you mean '{'.'.join(map(str, [*path, close[0]]))}'?"
    return f"valid keys there: {', '.join(valid) or 'none'}."


def _ended(text: str) -> str:
    """A sentence with its full stop or question mark."""
    return text if text.endswith("?") else text.rstrip(".") + "."


def _wanted(item: Any, owner: Any) -> str:
    kind: str = item["type"]
    if kind.startswith(("model", "dict")):
        keys = _keys(owner) if kind.startswith("model") else []
        return "must be a mapping" + (f" with keys such as {', '.join(keys[:3])}" if keys else " of keys to values")
    found = _WANTED.get(kind) or next((text for start, text in _WANTED.items() if kind.startswith(start + "_")), None)
    return found.format(**item.get("ctx", {})) if found else item["msg"][0].lower() + item["msg"][1:]


def _meant(item: Any) -> str:
    """The valid word that is nearest to a wrong one."""
    if item["type"] != "literal_error" or not isinstance(item.get("input"), str):
        return ""
    valid = [word.strip().strip("'") for part in item["ctx"]["expected"].split(" or ") for word in part.split(",")]
    close = nearest(item["input"], valid, 1)
    return f" Did you mean '{close[0]}'?" if close else ""


def _joined(texts: Sequence[str]) -> str:
    """`must be a number or a list`."""
    return " or ".join(text if i == 0 else text.removeprefix("must be ") for i, text in enumerate(texts))


# ---- where in a config a mistake is ----------------------------------------------------------------------------------


def _place(loc: Sequence[Any], model: Any) -> tuple[list[Any], Any]:
    """A pydantic location as the keys of a recipe, and the type that it leads to (for an unknown key, that of its
    owner).

    Pydantic names the alternatives of a union among the keys (`weight.float`, `augment.list[str]`); those are left out.
    """
    path: list[Any] = []
    here: Any = model
    for part in loc:
        alternatives = list(_alternatives(here))
        if _is_tag(part, alternatives):
            continue
        found = next((a for a in alternatives if _holds(a, part)), None)
        here = here if found is None else _inside(found, part)
        path.append(part)
    return path, here


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The types that an annotation allows, without Annotated, unions and type aliases around them."""
    origin = get_origin(annotation)
    if _is_model(annotation) or origin in (list, dict, tuple, Literal):
        yield annotation
    elif hasattr(annotation, "__metadata__"):
        yield from _alternatives(get_args(annotation)[0])
    elif get_args(annotation):
        for inner in get_args(annotation):
            yield from _alternatives(inner)
    else:
        yield annotation


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _holds(annotation: Any, part: Any) -> bool:
    if _is_model(annotation):
        return part in annotation.model_fields
    if get_origin(annotation) in (list, tuple):
        return isinstance(part, int)
    return get_origin(annotation) is dict


def _inside(annotation: Any, part: Any) -> Any:
    if _is_model(annotation):
        return annotation.model_fields[part].annotation
    arguments = get_args(annotation)
    return arguments[-1] if get_origin(annotation) is dict else arguments[0]


def _is_tag(part: Any, alternatives: Sequence[Any]) -> bool:
    """Whether a part of a location names an alternative of a union rather than a key."""
    names = {a.__name__ for a in alternatives if isinstance(a, type)}
    return isinstance(part, str) and len(alternatives) > 1 and ("[" in part or part in names)


def _keys(annotation: Any) -> list[str]:
    """Valid keys of the model that an annotation holds."""
    return next((list(a.model_fields) for a in _alternatives(annotation) if _is_model(a)), [])
