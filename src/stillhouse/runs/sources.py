"""A hash of the code that a recipe runs, so that results of other code are recognised.

The files are those of the recipe's method and objectives, all files of this package that they import, directly or
not, and the recipe's own `file:` references. Imports are read from the source; nothing is imported, so what is found by
name at run time (a data format, an evaluator) does not count, and neither do comments, docstrings and layout.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from stillhouse import catalog
from stillhouse.errors import UserError

_PACKAGE = "stillhouse"
_ROOT = Path(__file__).parents[1]


def source_hash(tree: Mapping[str, Any], folder: Path = Path()) -> str:
    """The hash of a recipe's code, 16 hexadecimal digits.

    Args:
        tree: the recipe, resolved.
        folder: where the recipe lies, for its `file:` references.

    Raises:
        UserError: a method or objective that does not exist, or a file that cannot be read as Python.
    """
    roots = {catalog.card(name).file for name in _names(tree)}
    own = {path for path in _references(tree, folder) if path.is_file()}
    out = hashlib.sha256()
    for path in sorted(_closure(roots) | own, key=lambda p: (p in own, str(p))):
        out.update(_read(path, path.stat().st_mtime_ns).digest)
    return out.hexdigest()[:16]


def source_files(tree: Mapping[str, Any]) -> list[Path]:
    """The files of this package (and of plug-ins) that the hash covers."""
    return sorted(_closure(catalog.card(name).file for name in _names(tree)))


def _names(value: Any, top: bool = True) -> Iterator[str]:
    """The methods and objectives that a recipe names, wherever they stand."""
    if isinstance(value, Mapping):
        method = value.get("method", "distillation" if top else None)
        if isinstance(method, str) and not method.startswith("file:"):
            yield method
        for objective in value.get("objectives") or ():
            name = objective.get("name") if isinstance(objective, Mapping) else objective
            if isinstance(name, str) and not name.startswith("file:"):
                yield name
        for part in value.values():
            yield from _names(part, top=False)
    elif isinstance(value, list):
        for part in value:
            yield from _names(part, top=False)


def _references(value: Any, folder: Path) -> Iterator[Path]:
    """The Python files that a recipe names by `file:PATH.py`."""
    if isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _references(part, folder)
    elif isinstance(value, str) and (found := re.match(r"file:(.+?\.py)\b", value)):
        path = Path(found.group(1)).expanduser()
        yield path if path.is_file() else folder / path


class _Source:
    """A parsed file: the digest of its code, and the files of the package that it imports."""

    def __init__(self, path: Path) -> None:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as Python: {error}.") from None
        code = hashlib.sha256()
        imports: set[Path] = set()
        package = _module(path).split(".")[: None if path.name == "__init__.py" else -1]
        for text in _written(tree, imports, package):
            code.update(text.encode("utf-8", "surrogatepass"))
        self.digest, self.imports = code.digest(), frozenset(imports)


@lru_cache(maxsize=4096)
def _read(path: Path, changed: int) -> _Source:
    """The parsed file; `changed` is its time stamp."""
    return _Source(path)


def _closure(roots: Iterable[Path]) -> set[Path]:
    found: set[Path] = set()
    ahead = list(roots)
    while ahead:
        path = ahead.pop()
        if path not in found:
            found.add(path)
            ahead += _read(path, path.stat().st_mtime_ns).imports
    return found


def _written(node: ast.AST, imports: set[Path], package: list[str]) -> Iterator[str]:
    """The code as pieces of text that are the same in every version of Python, without docstrings; notes imports on
    the way."""
    if isinstance(node, ast.Import):
        imports.update(path for alias in node.names for path in _files(alias.name))
    elif isinstance(node, ast.ImportFrom):
        above = package[: len(package) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        imports.update(path for alias in node.names for path in _files(f"{base}.{alias.name}") or _files(base))
    yield type(node).__name__
    for name in node._fields:
        value = getattr(node, name, None)
        if value in (None, []) or name in ("ctx", "kind", "type_comment", "type_ignores"):
            continue
        if name == "body" and isinstance(value, list) and _is_docstring(node, value[0]):
            value = value[1:]
        yield f"({name}"
        for part in value if isinstance(value, list) else (value,):
            if not isinstance(part, ast.AST):
                yield repr(part)
            elif not (isinstance(part, ast.If) and _only_for_types(part.test)):
                yield from _written(part, imports, package)
        yield ")"


def _is_docstring(owner: ast.AST, first: ast.AST) -> bool:
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if not isinstance(owner, owners) or not isinstance(first, ast.Expr):
        return False
    return isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


def _only_for_types(test: ast.expr) -> bool:
    return getattr(test, "id", None) == "TYPE_CHECKING" or getattr(test, "attr", None) == "TYPE_CHECKING"


def _module(path: Path) -> str:
    """The dotted name of a file of this package; of another file, its stem."""
    if not path.is_relative_to(_ROOT):
        return path.stem
    parts = path.relative_to(_ROOT).with_suffix("").parts
    return ".".join([_PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)])


@lru_cache(maxsize=4096)
def _files(module: str) -> tuple[Path, ...]:
    """The file of a module of this package, with those of the packages that it lies in (all but the root's, which
    only leads to the others)."""
    parts = module.split(".")
    if parts[0] != _PACKAGE or len(parts) == 1:
        return ()
    path = _ROOT.joinpath(*parts[1:])
    own = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not own.is_file():
        return ()
    above = (folder / "__init__.py" for folder in path.parents if folder.is_relative_to(_ROOT) and folder != _ROOT)
    return (own, *(file for file in above if file.is_file()))
