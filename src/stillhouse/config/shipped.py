"""The recipes that come with the package, by name: those of a clone's `recipes/`, or of an installed wheel."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from stillhouse.errors import unknown

IN_WHEEL = "share/stillhouse/recipes/"


def shipped() -> dict[str, Path]:
    """Name -> file of every recipe that is there, sorted by family and name; {} where the package came without them."""
    clone = Path(__file__).parents[3] / "recipes"
    if clone.is_dir():
        files = list(clone.glob("*/*.yaml"))
    else:
        try:
            installed = metadata.files("stillhouse") or []
        except metadata.PackageNotFoundError:
            installed = []
        files = [Path(str(f.locate())) for f in installed if IN_WHEEL in f.as_posix() and f.suffix == ".yaml"]
    return {path.stem: path.resolve() for path in sorted(files)}


def located(recipe: Path) -> Path:
    """A recipe's file: as given, or where there is no such file and the name has neither folder nor ending, the recipe
    that comes with the package under this name."""
    if recipe.exists() or recipe.suffix or len(recipe.parts) != 1:
        return recipe
    return shipped().get(recipe.name, recipe)


def text(name: str) -> str:
    """What a shipped recipe's file holds.

    Raises:
        UserError: an unknown name, with the nearest.
    """
    there = shipped()
    if name not in there:
        raise unknown("recipe", name, there, " in the package")
    return there[name].read_text(encoding="utf-8")


def about(path: Path) -> str:
    """A recipe's first comment, in one line."""
    with path.open(encoding="utf-8") as lines:
        first = next(lines, "")
    return first.removeprefix("#").strip() if first.startswith("#") else ""
