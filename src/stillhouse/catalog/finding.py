"""The catalogue: slug -> file -> card, objective or method. Cards are read as text; a file is imported only when it is
used.

Under `objectives/` and `methods/` a paper is one file, whose name is its slug, or one folder, whose `method.py` has the
card and whose other files are its own. Other packages add theirs by entry points in the groups `stillhouse.objectives`
and `stillhouse.methods` (name = slug, value = module); a recipe may also name `file:PATH.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.errors import UserError, unknown

if TYPE_CHECKING:
    from types import ModuleType

    from pydantic import BaseModel


BASES = {
    "objective": "stillhouse.distillation.objective:Objective",
    "method": "stillhouse.runs.method:Method",
    "task": "stillhouse.tasks.base:Task",
}
"""Kind -> the class that its files subclass; a string, as the rooms of papers lie above the catalogue."""
CARDED = ("objective", "method")
"""The kinds that have cards, each in a folder of its plural."""
_PACKAGE = Path(__file__).parents[1]
_CARD = "method.py"
"""The file of a paper's folder that has its card."""
_PAIR = re.compile(r"([a-z][a-z ]{1,20}): (.*)")
_DOCSTRING = re.compile(r'\A\s*(?:#[^\n]*\n)*\s*[rR]?"""(.*?)"""', re.DOTALL)


@dataclass(frozen=True)
class Card:
    """A method's catalogue entry.

    Attributes:
        kind: "objective" or "method".
        module: what is imported for it: the paper's file, or the package that its folder is.
        file: where the card is: the paper's file, or `method.py` of its folder.
        fields: paper, venue, arxiv, task, family, use when, needs, and provides where the names differ from the slug.
    """

    slug: str
    kind: str
    title: str
    module: str
    file: Path
    fields: dict[str, str] = field(default_factory=dict)
    text: str = ""

    @property
    def provides(self) -> tuple[str, ...]:
        """The names that recipes use."""
        return tuple(n.strip() for n in self.fields.get("provides", self.slug).split(",") if n.strip())

    @property
    def missing(self) -> str:
        """What the card lacks to be complete, in words; empty for a complete one."""
        if not self.title:
            return "a title, the first line of its docstring"
        if not (self.fields.get("paper") or self.fields.get("arxiv")):
            return "a line `paper: …` or `arxiv: …` under its title"
        return ""


def read_card(file: Path, slug: str, kind: str, module: str) -> Card:
    """The card at the head of a file: a title line, `key: value` lines, prose.

    Without a title line, the title is empty.
    """
    with open(file, encoding="utf-8") as handle:
        match = _DOCSTRING.match(handle.read(8192))
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(match.group(1))) if match else []
    title = "" if not paragraphs or _PAIR.match(paragraphs[0]) else " ".join(paragraphs.pop(0).split())
    fields: dict[str, str] = {}
    if paragraphs and _PAIR.match(paragraphs[0]):
        name = ""
        for line in paragraphs.pop(0).splitlines():
            pair = _PAIR.match(line)
            if pair:
                name = pair.group(1)
                fields[name] = pair.group(2).strip()
            else:
                fields[name] += " " + line.strip()
    return Card(slug, kind, title, module, file, fields, "\n\n".join(paragraphs))


def scan(folder: Path, kind: str, package: str) -> Iterator[Card]:
    """The cards of a folder of papers, in the order of their names; nothing is imported.

    Args:
        folder: holds papers (files, or folders with `method.py`) and folders of such.
        kind: "objective" or "method".
        package: its name as a module.

    Raises:
        UserError: an incomplete card, or a folder that holds Python files but no card.
    """
    for path in sorted(folder.iterdir()):
        module = f"{package}.{path.stem}"
        if path.name.startswith(("_", ".")):
            continue
        if path.suffix == ".py":
            yield _complete(read_card(path, path.stem, kind, module))
        elif (path / _CARD).is_file():
            yield _complete(read_card(path / _CARD, path.name, kind, module))
        elif path.is_dir() and next(path.rglob("*.py"), None) is not None:
            found = list(scan(path, kind, module))
            if not found:
                raise UserError(
                    f"{path} holds no {kind}: a paper's folder needs a file {_CARD}, whose docstring is its card."
                )
            yield from found


def _complete(entry: Card) -> Card:
    if entry.missing:
        raise UserError(
            f"{entry.file} is not a complete card: it lacks {entry.missing}. What no paper describes says `paper: "
            "none`; "
            f"a file that only helps a paper belongs in that paper's folder, next to its {_CARD}."
        )
    return entry


def _plugin(slug: str, kind: str, module: str) -> Card | None:
    """The card of another package's module; None where there is no such module."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    if spec is None or not spec.origin:
        return None
    file = Path(spec.origin)
    if file.name == "__init__.py" and (file.parent / _CARD).is_file():
        file = file.parent / _CARD
    entry = read_card(file, slug, kind, module)
    return entry if entry.title else replace(entry, title=slug)


@lru_cache(maxsize=1)
def cards() -> dict[str, Card]:
    """Every card by slug, ours and those of other packages, without importing their files.

    Raises:
        UserError: an incomplete card of this package, or two of one slug.
    """
    found: dict[str, Card] = {}
    for kind in CARDED:
        for entry in scan(_PACKAGE / f"{kind}s", kind, f"stillhouse.{kind}s"):
            if entry.slug in found:
                raise UserError(
                    f"{entry.file} and {found[entry.slug].file} have one slug, '{entry.slug}'; rename one of them."
                )
            found[entry.slug] = entry
    for kind in CARDED:
        for point in entry_points(group=f"stillhouse.{kind}s"):
            plugin = _plugin(point.name, kind, point.value.partition(":")[0])
            if plugin is not None:
                found[point.name] = plugin
    return found


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
    """The class of that name, or the only one, of those that a module, or the files of its folder, define."""
    where, _, base_name = BASES[kind].partition(":")
    base: type = getattr(importlib.import_module(where), base_name)
    inside = module.__name__ + "."
    classes = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, base) and c is not base and f"{c.__module__}.".startswith(inside)
    ]
    for cls in classes:
        if cls.__name__ == name or getattr(cls, "name", None) == name:
            return cls
    if len(classes) == 1 and not by_name:
        return classes[0]
    known = ", ".join(c.__name__ for c in classes) or "none"
    raise UserError(f"{module.__file__} holds no {base.__name__} named '{name}'; it holds: {known}.")


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
            raise UserError(
                f"'{name}' is an objective, not a method: leave `method:` out and list it under `objectives:`."
            )
        raise unknown("method", name, names)
    return _class_in(_import(names[name]), "method", name, by_name=False)()


def task(name: str) -> Any:
    """The class of a task: a file of `tasks/`, or an entry point of the group `stillhouse.tasks` (name =
    `module:Class`)."""
    own = {f.stem for f in (_PACKAGE / "tasks").glob("*.py")} - {"__init__", "base"}
    if name in own:
        return _class_in(importlib.import_module(f"stillhouse.tasks.{name}"), "task", name, by_name=True)
    points = {p.name: p for p in entry_points(group="stillhouse.tasks")}
    if name not in points:
        raise unknown("task", name, {*own, *points})
    return points[name].load()


FORMATS_ABOVE = {"synthetic": "stillhouse.synthetic.exchange"}
"""Scheme -> the module of a data format that lies in a higher room than `data`."""


def data_format(scheme: str) -> ModuleType:
    """The module of a data format: a file of `data/formats/`, or an entry point of the group `stillhouse.data` (scheme
    = `module`). Only that module is imported."""
    own = {f.stem: f"stillhouse.data.formats.{f.stem}" for f in (_PACKAGE / "data" / "formats").glob("[!_]*.py")}
    modules = {**{p.name: p.value for p in entry_points(group="stillhouse.data")}, **own, **FORMATS_ABOVE}
    if scheme not in modules:
        raise unknown("data set", scheme, sorted(modules))
    return importlib.import_module(modules[scheme])


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
        f"{cls.__name__}Options",
        __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=()),
        **fields,
    )
