"""The rooms of the package lie on floors: imports point down only, those inside functions and under TYPE_CHECKING
included, and no files import in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import stillhouse

PACKAGE = Path(stillhouse.__file__).parent
FLOORS = (
    "errors",
    "devices files processes randomness signals",
    "catalog",
    "config",
    "functional",
    "nn",
    "models",
    "evaluation",
    "tasks",
    "data",
    "training",
    "store",
    "distillation",
    "objectives",
    "reporting",
    "runs",
    "generation pretraining synthetic",
    "methods",
    "api integrations",
    "demo",
    "cli",
    "__main__",
)
"""From the ground up; rooms of one floor do not import each other."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
MODULES_AT_THE_ROOT = 13


def imports() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports anywhere in its file; the package's face (`stillhouse` itself) is left
    out, as it loads names when used."""
    files: dict[str, Path] = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ("stillhouse", *path.relative_to(PACKAGE).with_suffix("").parts)
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path

    def module_of(name: str) -> str:
        while name and name not in files:
            name = name.rpartition(".")[0]
        return name

    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {module_of(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{module}: a relative import"
                found |= {module_of(f"{node.module}.{alias.name}") for alias in node.names}
        graph[module] = found - {module, "", "stillhouse"}
    del graph["stillhouse"]
    return graph


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_room_has_a_floor():
    there = {room(m) for m in imports()}
    assert there <= set(FLOOR), f"give them a floor: {sorted(there - set(FLOOR))}"
    assert set(FLOOR) <= there | {"nn", "tasks"}, f"rooms that are no more: {sorted(set(FLOOR) - there)}"


def test_imports_point_down():
    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if room(other) != room(module) and FLOOR[room(other)] >= FLOOR[room(module)]
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_no_files_import_in_a_circle():
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_few_modules_stay_at_the_root():
    assert len(list(PACKAGE.glob("*.py"))) <= MODULES_AT_THE_ROOT
