"""A run's folder: who may use it, and with which recipe an unfinished run may continue."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stillhouse.config.reading import parse_yaml
from stillhouse.errors import UserError
from stillhouse.files import atomic_write, remove

STEADYING = frozenset({"lr", "clip", "weight"})
"""Keys that may change after a training diverged: it continues from its last good checkpoint."""


LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other process works in the folder. Raises `UserError` where one does, or where the folder is a
    file."""
    from filelock import FileLock, Timeout

    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder with --out.")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(folder / LOCK), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"Another process is at work in {folder}; wait until it ends, or choose another folder with --out."
        ) from None
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):
            folder.rmdir()  # where nothing was written


def lacks_report(folder: Path, text: str) -> bool:
    """Whether a run of this recipe is finished but for its report."""
    recipe = folder / "recipe.yaml"
    finished = (folder / "evaluation.json").is_file() and not (folder / "report.html").exists()
    return finished and recipe.is_file() and recipe.read_text() == text


def claim(folder: Path, text: str, overwrite: bool) -> dict[str, Any]:
    """Make the folder this run's, or refuse it: nothing that is not a run's is ever removed or written over.

    An unfinished run continues with the same recipe; one that diverged, also with other learning rates, clipping or
    weights of objectives; one in which nothing was trained yet, with any recipe.

    Returns:
        What was changed after a training diverged, by dotted key: [before, now]. With what was changed so before.
    """
    recipe = folder / "recipe.yaml"
    there = (
        {p.name for p in folder.iterdir() if p.name != LOCK and not p.name.endswith(".partial")}
        if folder.exists()
        else set()
    )
    before = recipe.read_text() if "recipe.yaml" in there else None
    ours = before is not None and (
        "environment.json" in there or len(there) == 1
    )  # not so where a user keeps a recipe.yaml among other files
    if there and not ours and (overwrite or before != text):
        left = "so --overwrite leaves it alone" if overwrite else "so it is left alone"
        raise UserError(
            f"{folder} is not a run's folder (no recipe.yaml with an environment.json), {left}; choose another folder "
            "with --out."
        )
    changes: dict[str, Any] = {}
    if overwrite and there:
        clear(folder)
    elif "evaluation.json" in there:
        raise UserError(
            f"{folder} holds a finished run; choose another folder with --out, or start over with --overwrite."
        )
    elif before is not None:
        changes = _earlier_changes(folder)
        if before != text and trained(folder):
            changes |= _steadied(folder, before, text)
    with atomic_write(recipe) as temporary:
        temporary.write_text(text)
    return changes


def clear(folder: Path) -> None:
    """Remove everything in a run's folder but its lock; what a link leads to stays. What says that the folder is a
    run's goes last, so that one that is half removed is still known as such."""
    last = ("environment.json", "recipe.yaml")
    for path in sorted(folder.iterdir(), key=lambda p: last.index(p.name) if p.name in last else -1):
        if path.name != LOCK:
            remove(path)


def trained(folder: Path) -> bool:
    """Whether an unfinished run holds anything that was trained."""
    files = (p for name in ("checkpoints", "stages") for p in (folder / name).rglob("*") if p.is_file())
    return any(not p.name.startswith(".") and not p.name.endswith((".lock", ".owner.json")) for p in files)


def seconds_before(folder: Path) -> float:
    """How long earlier starts of an unfinished run worked: up to the last file that they wrote in its folder."""
    try:
        facts = json.loads((folder / "environment.json").read_text())
        before, started = float(facts.get("seconds before", 0.0)), float(facts["started"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0.0
    files = [folder / "metrics.csv", *(p for name in ("checkpoints", "stages") for p in (folder / name).rglob("*"))]
    last = max((p.stat().st_mtime for p in files if p.is_file()), default=started)
    return before + max(last - started, 0.0)


def diverged(folder: Path) -> bool:
    """Whether a training of an unfinished run diverged."""
    return any((folder / "checkpoints").glob("*.diverged"))


def _earlier_changes(folder: Path) -> dict[str, Any]:
    try:
        changes: dict[str, Any] = json.loads((folder / "environment.json").read_text()).get(
            "changed after divergence", {}
        )
    except (OSError, ValueError):
        return {}
    return changes


def _steadied(folder: Path, before: str, now: str) -> dict[str, Any]:
    """What differs between two recipes of a training that diverged. Raises `UserError` for anything else that
    differs."""
    there = str(folder / "recipe.yaml")
    old, new = dict(_leaves(parse_yaml(before, there))), dict(_leaves(parse_yaml(now, "the recipe")))
    changed = {key: [old.get(key), new.get(key)] for key in {**old, **new} if old.get(key) != new.get(key)}
    other = [key for key in changed if key.rpartition(".")[2] not in STEADYING]
    if other or not diverged(folder):
        key = (other or list(changed))[0]
        was, wanted = ("absent" if v is None else repr(v) for v in changed[key])
        raise UserError(
            f"{folder} holds an unfinished run of another recipe ({key}: {was} there, {wanted} now); choose another "
            "folder with --out, or start over "
            "with --overwrite."
        )
    return changed


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of a tree with their values."""
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for number, child in enumerate(value):
            yield from _leaves(child, f"{path}.{number}")
    else:
        yield path, value
