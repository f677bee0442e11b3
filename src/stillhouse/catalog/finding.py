"""The catalogue: slug -> file -> card, objective or method. Cards are read from docstrings as text; a file is imported only when it is used.

A file under `objectives/` or `methods/**/` is found by its name. Other packages add theirs by entry points in the groups
`stillhouse.objectives` and `stillhouse.methods` (name = slug, value = module); a recipe may also name `file:PATH.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.errors import UserError, unknown

if TYPE_CHECKING:
    from types import ModuleType

    from pydantic import BaseModel


BASES = {"objective": "stillhouse.distillation.objective:Objective", "method": "stillhouse.runs.method:Method", "task": "stillhouse.tasks.base:Task"}
"""Kind -> the class that its files subclass; a string, as the rooms of papers lie above the catalogue."""
_HERE = Path(__file__).parents[1]
_DOCSTRING = re.compile(r'\A\s*(?:#[^\n]*\n)*\s*[rR]?"""(.*?)"""', re.DOTALL)


@dataclass(frozen=True)
class Card:
    """A method's catalogue entry."""

    slug: str
    kind: str  # "objective" or "method"
    title: str
    module: str
    file: Path
    fields: dict[str, str] = field(default_factory=dict)  # paper, venue, arxiv, task, family, use when, needs
    text: str = ""

    @property
    def provides(self) -> tuple[str, ...]:
        """The names that recipes use."""
        return tuple(n.strip() for n in self.fields.get("provides", self.slug).split(",") if n.strip())


def read_card(file: Path, slug: str, kind: str, module: str) -> Card:
    """The card at the head of a file: a title line, `key: value` lines, prose."""
    with open(file, encoding="utf-8") as handle:
        match = _DOCSTRING.match(handle.read(8192))
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(match.group(1))) if match else [slug]
    fields: dict[str, str] = {}
    rest = []
    for i, paragraph in enumerate(paragraphs[1:]):
        lines = paragraph.splitlines()
        if i == 0 and re.match(r"[a-z][a-z ]{1,20}: ", lines[0]):
            name = ""
            for line in lines:
                pair = re.match(r"([a-z][a-z ]{1,20}): (.*)", line)
                if pair:
                    name = pair.group(1)
                    fields[name] = pair.group(2).strip()
                else:
                    fields[name] += " " + line.strip()
        else:
            rest.append(paragraph)
    return Card(slug, kind, " ".join(paragraphs[0].split()), module, file, fields, "\n\n".join(rest))


def _module_file(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin else None


@lru_cache(maxsize=1)
def cards() -> dict[str, Card]:
    """Every card by slug, ours and those of other packages, without importing their files."""
    found: dict[str, Card] = {}
    for kind, folder in (("objective", "objectives"), ("method", "methods")):
        for file in sorted((_HERE / folder).rglob("*.py")):
            package = file.name == "__init__.py"
            if package != _is_paper(file.parent) or (file.name.startswith("_") and not package):
                continue
            slug = file.parent.name if package else file.stem
            module = "stillhouse." + ".".join(file.relative_to(_HERE).with_suffix("").parts).removesuffix(".__init__")
            found[slug] = read_card(file, slug, kind, module)
    for kind in ("objective", "method"):
        for point in entry_points(group=f"stillhouse.{kind}s"):
            plugin = _module_file(point.value.partition(":")[0])
            if plugin is not None:
                found[point.name] = read_card(plugin, point.name, kind, point.value.partition(":")[0])
    return found


@cache
def _is_paper(folder: Path) -> bool:
    """A folder of a paper's slug, rather than a folder of papers: its docstring has an arxiv or paper line."""
    init = folder / "__init__.py"
    return init.exists() and re.search(r"^(paper|arxiv): ", init.read_text("utf-8")[:4096], re.MULTILINE) is not None


def list_methods() -> list[Card]:
    """All cards, sorted by kind and slug."""
    return sorted(cards().values(), key=lambda c: (c.kind, c.slug))


def card(name: str) -> Card:
    """The card of a slug, or of the file that provides an objective of that name."""
    every = cards()
    if name in every:
        return every[name]
    for entry in every.values():
        if name in entry.provides:
            return entry
    raise unknown("method", name, [*every, *(n for c in every.values() for n in c.provides if n not in every)])


def _import(entry: Card) -> ModuleType:
    return importlib.import_module(entry.module)


def load_file(reference: str) -> tuple[ModuleType, str | None]:
    """Import `file:PATH.py` or `file:PATH.py:NAME`, the only way in which a recipe runs code that is not installed."""
    path_text, _, name = reference.removeprefix("file:").partition(".py")
    path = Path(path_text + ".py").expanduser().resolve()
    if not path.is_file():
        raise UserError(f"There is no Python file '{path}' (from '{reference}').")
    module_name = "stillhouse_user_" + re.sub(r"\W", "_", str(path))
    if module_name in sys.modules:
        return sys.modules[module_name], name.removeprefix(":") or None
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module, name.removeprefix(":") or None


def _class_in(module: ModuleType, kind: str, name: str, by_name: bool) -> type:
    where, _, base_name = BASES[kind].partition(":")
    base: type = getattr(importlib.import_module(where), base_name)
    classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, base) and c is not base and c.__module__ == module.__name__]
    for cls in classes:
        if cls.__name__ == name or getattr(cls, "name", None) == name:
            return cls
    if len(classes) == 1 and not by_name:
        return classes[0]
    raise UserError(f"{module.__file__} holds no {base.__name__} named '{name}'; it holds: {', '.join(c.__name__ for c in classes) or 'none'}.")


def objective(name: str) -> Any:
    """The class of an objective; only its file is imported."""
    if name.startswith("file:"):
        module, cls = load_file(name)
        return _class_in(module, "objective", cls or "", by_name=cls is not None)
    names = {n: c for c in cards().values() if c.kind == "objective" for n in c.provides}
    if name not in names:
        raise unknown("objective", name, names)
    return _class_in(_import(names[name]), "objective", name, by_name=len(names[name].provides) > 1)


def method(name: str) -> Any:
    """The method of a slug, ready to plan and run; only its file is imported."""
    if name.startswith("file:"):
        module, cls = load_file(name)
        return _class_in(module, "method", cls or "", by_name=cls is not None)()
    names = {slug: c for slug, c in cards().items() if c.kind == "method"}
    if name not in names:
        objectives = [n for c in cards().values() if c.kind == "objective" for n in c.provides]
        if name in objectives:
            raise UserError(f"'{name}' is an objective, not a method: leave `method:` out and list it under `objectives:`.")
        raise unknown("method", name, names)
    return _class_in(_import(names[name]), "method", name, by_name=False)()


def task(name: str) -> Any:
    """The class of a task: a file of `tasks/`, or an entry point of the group `stillhouse.tasks` (name = `module:Class`)."""
    own = {f.stem for f in (_HERE / "tasks").glob("*.py")} - {"__init__", "base"}
    if name in own:
        return _class_in(importlib.import_module(f"stillhouse.tasks.{name}"), "task", name, by_name=True)
    points = {p.name: p for p in entry_points(group="stillhouse.tasks")}
    if name not in points:
        raise unknown("task", name, {*own, *points})
    return points[name].load()


def options(cls: type) -> type[BaseModel]:
    """The options of an objective as a pydantic model, from the types and defaults of its `__init__`."""
    import typing

    from pydantic import ConfigDict, create_model

    hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hints.get(parameter.name, Any), default)
    return create_model(
        f"{cls.__name__}Options", __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=()), **fields
    )
