"""Recipe files as plain mappings: reading YAML strictly, applying a variant and overrides, and writing a config
back."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from stillhouse import catalog
from stillhouse.errors import UserError, nearest


class _Once(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which no mapping gives a key twice (plain YAML takes the last one silently)."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (k for k, _ in node.value if isinstance(k, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"the key '{key.value}' is given twice", key.start_mark)
            seen.add(key.value)
        return node


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A recipe file as a mapping. Raises `UserError` for a file that is missing, is not YAML, gives a key twice, or is
    not a mapping."""
    path = Path(path)
    if not path.is_file():
        raise _no_recipe(path)
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _Once)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path} is not valid YAML{at}: {getattr(error, 'problem', None) or error}.") from None
    if not isinstance(value, dict):
        raise UserError(
            f"{path} must hold a mapping of keys to values, but holds "
            f"{'nothing' if value is None else type(value).__name__}."
        )
    return value


def _no_recipe(path: Path) -> UserError:
    """What to do about a recipe that is not there: name one of the folder, one nearby, or that of the method."""
    if path.is_dir():
        inside = sorted(path.glob("*.y*ml"))
        return UserError(
            f"'{path}' is a folder; name a recipe in it"
            + (f", such as '{inside[0]}'." if inside else ", but it holds none.")
        )
    close = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else [], 1)
    if close:
        return UserError(f"There is no recipe '{path}'; did you mean '{path.parent / close[0]}'?")
    ours = next(Path("recipes").rglob(f"{path.stem}.yaml"), None)
    if ours is not None:
        return UserError(f"There is no recipe '{path}'; did you mean '{ours}'?")
    if path.stem in catalog.cards():
        return UserError(
            f"There is no recipe '{path}': a recipe is a YAML file, and `stillhouse methods {path.stem}` shows the "
            "keys of one."
        )
    return UserError(
        f"There is no recipe '{path}'; `stillhouse methods` lists the methods and objectives that a recipe can name."
    )


def set_key(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `a.b.0.c` in nested mappings and lists; missing mappings are created."""
    node: Any = tree
    parts = dotted.split(".")
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(node, list):
            if not part.lstrip("-").isdigit() or not -len(node) <= int(part) < len(node):
                raise UserError(
                    f"--set {dotted}: '{'.'.join(parts[:i])}' is a list of {len(node)}, so '{part}' must be a number "
                    f"from 0 to {len(node) - 1}."
                )
            if last:
                node[int(part)] = value
                return
            node = _as_node(node, int(part))
        elif isinstance(node, dict):
            if last:
                node[part] = value
                return
            node.setdefault(part, {})
            node = _as_node(node, part)
        else:
            raise UserError(f"--set {dotted}: '{'.'.join(parts[:i])}' holds a value, not keys.")


def _as_node(parent: Any, key: Any) -> Any:
    """The child to descend into; a string shorthand (`student: timm:x`, `objectives: [kd]`) becomes the mapping it
    stands for."""
    child = parent[key]
    if child is None:
        child = parent[key] = {}
    elif isinstance(child, str):
        stands_for = "name" if isinstance(parent, list) or key == "data" else "model"
        child = parent[key] = {stands_for: child}
    return child


def parse_sets(items: Sequence[str]) -> dict[str, Any]:
    """`["train.epochs=3", "seed=1"]` as {dotted key: value}; values are read as YAML."""
    out = {}
    for item in items:
        dotted, sep, text = item.partition("=")
        if not sep or not dotted:
            raise UserError(f"--set takes KEY=VALUE, such as train.epochs=3; given: '{item}'.")
        try:
            out[dotted.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--set {dotted}: the value '{text}' is not valid YAML.") from None
    return out


def resolve(
    tree: Mapping[str, Any], variant: str | None = None, sets: Mapping[str, Any] | None = None, where: str = "recipe"
) -> dict[str, Any]:
    """A raw recipe with its variant and overrides applied (in that order). What only a comparison reads (variants,
    groups, claims) is dropped."""
    out = copy.deepcopy(dict(tree))
    variants = out.pop("variants", None) or {}
    for key in ("groups", "claims"):
        out.pop(key, None)
    if variant is not None:
        if variant not in variants:
            close = nearest(variant, variants)
            there = f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(variants) or 'none'}."
            raise UserError(f"{where}: no variant '{variant}'; {there}")
        for dotted, value in variants[variant].items():
            set_key(out, dotted, copy.deepcopy(value))
    for dotted, value in (sets or {}).items():
        set_key(out, dotted, value)
    return out


def beside_recipe(value: Any, folder: Path) -> Any:
    """A raw recipe in which every `file:PATH.py` in the folder of the recipe (and not under the working folder) is
    named in full."""
    if isinstance(value, dict):
        return {k: beside_recipe(v, folder) for k, v in value.items()}
    if isinstance(value, list):
        return [beside_recipe(v, folder) for v in value]
    if isinstance(value, str) and value.startswith("file:"):
        path, dot, rest = value.removeprefix("file:").partition(".py")
        if not Path(path + dot).exists() and (folder / (path + dot)).exists():
            return f"file:{(folder / (path + dot)).resolve()}{rest}"
    return value


def dump(config: BaseModel) -> str:
    """A config as YAML that loads to the same config."""
    return yaml.safe_dump(
        config.model_dump(mode="json", exclude_none=True, exclude={"variants", "groups", "claims"}),
        sort_keys=False,
        allow_unicode=True,
        width=120,
    )
