"""Recipe files as plain mappings: reading YAML strictly, applying a variant and overrides, and writing a config
back."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from stillhouse import catalog
from stillhouse.config.messages import shown
from stillhouse.config.names import folder_name
from stillhouse.config.shipped import shipped
from stillhouse.errors import UserError, nearest

LARGEST = 100_000
"""Bytes of a recipe file; the largest here has 5,000."""
DEEPEST = 40
"""Mappings and lists inside each other."""
MOST = 20_000
"""Values in a recipe, those behind its anchors counted wherever they are used."""
_KINDS = ("null", "bool", "int", "float", "str", "seq", "map", "merge", "value")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML of plain values, in which no mapping gives a key twice (plain YAML takes the last one silently), nothing is
    endless, and every fault has its place."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]  # a date is text
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        self._depth += 1
        if self._depth > DEEPEST:
            raise _fault(f"more than {DEEPEST} mappings and lists inside each other", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (k for k, _ in node.value if isinstance(k, yaml.ScalarNode)):
            if key.value in seen:
                raise _fault(f"the key '{key.value}' is given twice", key.start_mark)
            seen.add(key.value)
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _count(node, {}, set())
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag.rpartition(":")[2] not in _KINDS:
            raise _fault(f"the tag '{_tag(node)}' has no meaning in a recipe", node.start_mark)
        try:
            value = super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception:  # what int(), float() and the like raise
            raise _fault(f"{node.value!r:.60} does not fit its tag '{_tag(node)}'", node.start_mark) from None
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise _fault("a whole number of more than 63 bits", node.start_mark)
        if isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
            raise _fault("text with characters that no file name and no file can hold", node.start_mark)
        return value


def _tag(node: yaml.Node) -> str:
    return str(node.tag).replace("tag:yaml.org,2002:", "!!")


def _fault(what: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.composer.ComposerError(None, None, what, mark)


def _count(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """The values that a node stands for; an anchor's count wherever it is used."""
    if id(node) in above:
        raise _fault("an anchor that holds itself", node.start_mark)
    if id(node) not in known:
        above.add(id(node))
        children = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        total = 1 + sum(_count(c, known, above) for c in children if isinstance(c, yaml.Node))
        above.discard(id(node))
        if total > MOST:
            raise _fault(f"more than {MOST:,} values, with those behind its anchors", node.start_mark)
        known[id(node)] = total
    return known[id(node)]


def parse_yaml(text: str, what: str) -> Any:
    """The value of a YAML text. Raises `UserError`, which begins with `what`, for one that is not valid, or not plain
    and finite."""
    try:
        if len(text) > LARGEST:
            raise UserError(f"{what} is too long for a recipe: {len(text):,} characters, of at most {LARGEST:,}.")
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        if problem.startswith("but "):  # found something else
            problem = f"{getattr(error, 'context', '')}, {problem}"
        raise UserError(f"{what} is not valid YAML{at}: {problem}.") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A recipe file as a mapping. Raises `UserError` for a file that is missing or too large, is not YAML, gives a key
    twice, or is not a mapping."""
    path = Path(path)
    if not path.is_file():
        raise _no_recipe(path)
    if path.stat().st_size > 4 * LARGEST:
        raise UserError(
            f"{path} is no recipe: it has {path.stat().st_size:,} bytes, where a recipe has a few thousand."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}).") from None
    value = parse_yaml(text, str(path))
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
    ours = shipped()
    if path.stem in ours:
        return UserError(f"There is no recipe '{path}'; did you mean '{path.stem}', which comes with the package?")
    if path.stem in catalog.cards():
        return UserError(
            f"There is no recipe '{path}': a recipe is a YAML file, and `stillhouse methods {path.stem}` shows the "
            "keys of one."
        )
    close = nearest(path.stem, ours, 1)
    if close:
        return UserError(f"There is no recipe '{path}'; did you mean '{close[0]}', which comes with the package?")
    return UserError(
        f"There is no recipe '{path}'; `stillhouse methods` lists the methods and objectives that a recipe can name."
    )


def set_key(tree: dict[str, Any], dotted: str, value: Any, how: str = "--set ") -> None:
    """Set `a.b.0.c` in nested mappings and lists; missing mappings are created.

    Args:
        how: what the sentence of an error begins with, before the key.
    """
    node: Any = tree
    parts = dotted.split(".")
    if not all(parts) or len(parts) > DEEPEST:
        raise UserError(f"{how}{dotted:.60}: a key is names and numbers with dots between them, such as train.epochs.")
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(node, list):
            if not re.fullmatch("-?[0-9]{1,9}", part) or not -len(node) <= int(part) < len(node):
                numbers = f"so '{part}' must be a number from 0 to {len(node) - 1}" if node else "in which nothing is"
                raise UserError(f"{how}{dotted}: '{'.'.join(parts[:i])}' is a list of {len(node)}, {numbers}.")
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
            raise UserError(f"{how}{dotted}: '{'.'.join(parts[:i])}' holds a value, not keys.")


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
        if not sep or not dotted.strip():
            raise UserError(f"--set takes KEY=VALUE, such as train.epochs=3; given: '{item:.60}'.")
        out[dotted.strip()] = parse_yaml(text, f"--set {dotted.strip():.60}: the value '{text:.60}'")
    return out


def named_values(tree: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """What stands under a key of named values (`variants`, `groups`), {} where there is nothing. Raises `UserError` for
    anything but mappings by names that a folder can have."""
    given = tree.get(key)
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise UserError(
            f"{where}: '{key}' must be a mapping of names to keys with their values; given: {shown(given)}."
        )
    for name, values in given.items():
        if not isinstance(name, str):
            raise UserError(f"{where}: a name in '{key}' must be text; given: {shown(name)} (put it in quotes).")
        if values is not None and not isinstance(values, Mapping):
            raise UserError(f"{where}: '{key}.{name}' must be a mapping of keys to values; given: {shown(values)}.")
    return {name: values or {} for name, values in given.items()}


def variants_of(tree: Mapping[str, Any], where: str = "recipe") -> dict[str, Any]:
    """The variants of a raw recipe: name -> what it sets. Raises `UserError` for what is no variant, or for a name that
    no folder can have."""
    variants = named_values(tree, "variants", where)
    for name, values in variants.items():
        folder_name(name, f"{where}: variants")
        for dotted in values:
            if not isinstance(dotted, str):
                raise UserError(f"{where}: a key in 'variants.{name}' must be text; given: {shown(dotted)}.")
    return variants


def resolve(
    tree: Mapping[str, Any], variant: str | None = None, sets: Mapping[str, Any] | None = None, where: str = "recipe"
) -> dict[str, Any]:
    """A raw recipe with its variant and overrides applied (in that order). What only a comparison reads (variants,
    groups, claims) is dropped."""
    out = copy.deepcopy(dict(tree))
    for key in ("variants", "groups", "claims"):
        out.pop(key, None)
    variants = variants_of(tree, where)
    if variant is not None:
        if variant not in variants:
            close = nearest(variant, variants)
            there = f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(variants) or 'none'}."
            raise UserError(f"{where}: no variant '{variant}'; {there}")
        for dotted, value in variants[variant].items():
            set_key(out, dotted, copy.deepcopy(value), f"{where}: variants.{variant}: ")
    for dotted, value in (sets or {}).items():
        set_key(out, dotted, copy.deepcopy(value))
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
