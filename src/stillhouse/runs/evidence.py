"""Evidence: the recorded results of comparisons, the verdicts that they give to recipes' claims, and which of them
are out of date.

A recorded row carries a hash of its recipe and one of the code that it ran. Files recorded before rows had hashes are
read as well; theirs are unknown.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from stillhouse import catalog
from stillhouse.config.reading import parse_sets, read_yaml, resolve
from stillhouse.errors import UserError
from stillhouse.files import atomic_write
from stillhouse.reporting.verdicts import Verdict
from stillhouse.runs.claims import BASE, judge, row_name
from stillhouse.runs.sources import source_hash


def recipe_hash(tree: Mapping[str, Any]) -> str:
    """The hash of a resolved recipe as it is written, 16 hexadecimal digits; its name and seed do not count."""
    return _digest({k: v for k, v in tree.items() if k not in ("name", "seed")})


def row_facts(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What makes rows comparable, of a resolved recipe: a hash of its data, and whether its method searches for its
    network."""
    given = tree.get("data")
    data = {"name": given} if isinstance(given, str) else given
    out: dict[str, Any] = {}
    if isinstance(data, Mapping):
        out["data"] = _digest({k: v for k, v in data.items() if k not in ("root", "workers", "views")})
    return out | ({"searches": True} if catalog.method(tree.get("method", "distillation")).searches else {})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Library:
    """The recipes and the evidence of a project.

    Attributes:
        recipes: where every recipe is, by its file's name.
        trees: the same, as they are written.
        results: every comparison by its file's name without the ending.
    """

    recipes: dict[str, Path]
    trees: dict[str, dict[str, Any]]
    results: dict[str, dict[str, Any]]
    folder: Path

    @classmethod
    def read(cls, recipes: Path = Path("recipes"), evidence: Path = Path("evidence")) -> Library:
        """Read both folders.

        Raises:
            UserError: a folder that is not there, two recipes of one name, or a file that is not a comparison.
        """
        for folder, what in ((recipes, "recipes"), (evidence, "evidence")):
            if not folder.is_dir():
                hint = f"start the command where the {what} are, or name the folder with --{what}"
                raise UserError(f"There is no folder '{folder}'; {hint}.")
        found: dict[str, Path] = {}
        for path in sorted(recipes.rglob("*.yaml")):
            if path.name in found:
                both = f"{found[path.name]} and {path}"
                raise UserError(f"Two recipes are called '{path.name}': {both}; evidence names recipes by their files.")
            found[path.name] = path
        results = {}
        for path in sorted(evidence.glob("*.json")):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise UserError(f"'{path}' is not JSON (line {error.lineno}: {error.msg}).") from None
            if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
                raise UserError(f"'{path}' is not the results of a comparison: it has no rows.")
            results[path.stem] = content
        return cls(found, {name: read_yaml(path) for name, path in found.items()}, results, evidence)

    def verdicts(self, recipe: str) -> list[Verdict]:
        """The verdicts of a recipe's claims, from all comparisons in which it has rows under its own settings."""
        path, tree = self.recipes[recipe], self.trees[recipe]
        if not tree.get("claims"):
            return []
        rows = {}
        for name, results in sorted(self.results.items(), key=lambda item: item[0] != path.stem):  # its own file first
            mine = [self._with_facts(path, row) for row in results["rows"] if row.get("recipe") == recipe]
            if mine and not _sets(results):
                rows[name] = mine
        return judge(tree, rows, str(path))

    def claimed(self) -> dict[str, list[Verdict]]:
        """The verdicts of every recipe that has claims."""
        return {name: found for name in self.recipes if (found := self.verdicts(name))}

    def missing(self) -> list[str]:
        """The methods and objectives that have a recipe of their name, or rows in the evidence, but no claim in any
        recipe."""
        claimed = {slug for name, verdicts in self.claimed().items() for v in verdicts for slug in self.papers(name, v)}
        with_rows = {Path(str(row.get("recipe"))).stem for results in self.results.values() for row in results["rows"]}
        recipes = {Path(name).stem for name in self.recipes}
        return sorted(slug for slug in catalog.cards() if slug in recipes | with_rows and slug not in claimed)

    def papers(self, recipe: str, verdict: Verdict) -> list[str]:
        """The cards that a claim is about: its own, that of the recipe's name, or those of the method and objectives
        of the row that it is of."""
        if verdict.paper is not None:
            return [verdict.paper]
        stem = Path(recipe).stem
        if stem in catalog.cards():
            return [stem]
        tree = self.trees[recipe]
        variant = row_name(verdict.of, tree).variant
        tree = resolve(tree, None if variant == BASE else variant)
        objectives = [o if isinstance(o, str) else str(o.get("name")) for o in tree.get("objectives") or ()]
        names = [str(tree.get("method", "distillation")), *objectives]
        found = dict.fromkeys(catalog.card(name).slug for name in names if not name.startswith("file:"))
        specific = [slug for slug in found if slug not in ("distillation", "ce")]
        return [slug for slug in specific if slug != "kd"] or specific

    def stale(self) -> Iterator[str]:
        """A line for every comparison whose rows are not of the present recipes and code, and one for all whose
        hashes are unknown."""
        unknown = []
        for name, results in self.results.items():
            reasons: dict[str, list[str]] = {}
            for row in results["rows"]:
                reason = self._change(row, _sets(results))
                if reason == "unknown":
                    unknown += [name] * (name not in unknown)
                elif reason:
                    group = f"/{row['group']}" if row.get("group") else ""
                    reasons.setdefault(reason, []).append(row["label"] + group)
            for reason, labels in reasons.items():
                yield f"stale: {self.folder / name}.json: {reason}: {', '.join(labels)}"
        if unknown:
            yield f"unknown: recorded before rows had hashes: {', '.join(unknown)}"

    def _change(self, row: Mapping[str, Any], sets: list[str]) -> str | None:
        """Why a row is out of date, `unknown` where it has no hashes, None where it is not."""
        path = self.recipes.get(str(row.get("recipe")))
        if path is None:
            return f"there is no recipe '{row.get('recipe')}' any more"
        if "recipe_hash" not in row:
            return "unknown"
        try:
            tree = self._tree(path, row, sets)
        except UserError:
            return "the recipe has no such variant or group any more"
        if recipe_hash(tree) != row["recipe_hash"]:
            return "the recipe has changed"
        return "the code has changed" if source_hash(tree, path.parent) != row.get("source_hash") else None

    def _tree(self, path: Path, row: Mapping[str, Any], sets: list[str]) -> dict[str, Any]:
        """The present recipe of a recorded row."""
        tree = self.trees[path.name]
        of_group: list[str] = []
        if row.get("group") is not None:
            values = {str(k): (key, v) for key, named in (tree.get("groups") or {}).items() for k, v in named.items()}
            if row["group"] not in values:
                raise UserError(f"{path} has no group '{row['group']}'.")
            key, value = values[row["group"]]
            of_group = [f"{key}={json.dumps(value)}"]
        return resolve(tree, row.get("variant"), parse_sets([*sets, *of_group]), where=str(path))

    def _with_facts(self, path: Path, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row recorded before rows had facts, with those of the present recipe."""
        if "recipe_hash" in row:
            return row
        try:
            return {**row, **row_facts(self._tree(path, row, []))}
        except UserError:
            return row

    def write_verdicts(self) -> list[Path]:
        """Put the verdicts that each comparison decides into its file, in place of those that are there. Returns the
        files that changed."""
        decided: dict[str, list[dict[str, Any]]] = {name: [] for name in self.results}
        for recipe, verdicts in self.claimed().items():
            for verdict in verdicts:
                if verdict.evidence is not None:
                    decided[verdict.evidence].append({"recipe": recipe, **verdict.record()})
        changed = []
        for name, found in decided.items():
            path = self.folder / f"{name}.json"
            after = json.dumps({**self.results[name], "claims": found}, indent=1) + "\n"
            if (found or "claims" in self.results[name]) and after != path.read_text(encoding="utf-8"):
                with atomic_write(path) as temporary:
                    temporary.write_text(after, encoding="utf-8")
                changed.append(path)
        return changed


def _sets(results: Mapping[str, Any]) -> list[str]:
    """What was set for all rows of a comparison, as KEY=VALUE; of older files, as their command has it."""
    if "sets" in results:
        return list(results["sets"])
    words = shlex.split(str(results.get("command") or ""))
    apart = [after for word, after in pairwise(words) if word == "--set"]
    return apart + [word.removeprefix("--set=") for word in words if word.startswith("--set=")]
