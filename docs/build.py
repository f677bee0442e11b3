"""Writes the generated pages: docs/recipes.md from the option types, docs/comparison.md, docs/claims.md,
docs/catalogue.md and docs/methods/ from cards, options, recipes and evidence.

`make docs` writes them again; `python docs/build.py --check` writes nothing and exits 1 where one is stale.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import yaml
from keys import SHARED, default, key_table, kind, prose, recipe_reference, table
from pydantic import BaseModel

from stillhouse import catalog
from stillhouse.catalog import Card
from stillhouse.config.specs import MethodConfig
from stillhouse.reporting.comparison import comparison_markdown
from stillhouse.reporting.verdicts import MEANING, SHOWN, Verdict, counted
from stillhouse.runs import recipe
from stillhouse.runs.claims import row_name
from stillhouse.runs.evidence import Library
from stillhouse.runs.listing import argument_words

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NOTE = "<!-- Written by docs/build.py; do not edit. `make docs` writes it again. -->\n"
BELOW = "<!-- From here on written by docs/build.py; do not edit. `make docs` writes it again. -->\n"
KINDS = {"objective": "Objectives", "method": "Methods"}


def pages() -> dict[Path, str]:
    """Every generated page by its path."""
    found = cards()
    out = {
        path: head(path) + text
        for path, text in (
            (DOCS / "recipes.md", recipe_reference()),
            (DOCS / "catalogue.md", catalogue(found)),
            (DOCS / "comparison.md", whole_comparison()),
            (DOCS / "claims.md", claims_page(found)),
        )
    }
    return out | {DOCS / "methods" / f"{c.slug}.md": method_page(c) for c in found}


def head(path: Path) -> str:
    """The written part of a page, up to the line that says what is generated."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return text.partition(BELOW)[0] + BELOW + "\n"


def cards() -> list[Card]:
    """The cards of this package (other packages' plug-ins are no part of its pages)."""
    return [c for c in catalog.list_methods() if c.module.startswith("stillhouse.") and c.fields]


def stale(wanted: dict[Path, str], folder: Path = DOCS / "methods") -> list[Path]:
    """Pages that differ from what they should be, and pages in the methods' folder of methods that are gone."""
    changed = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    return sorted([*changed, *(p for p in folder.glob("*.md") if p not in wanted)])


def write(wanted: dict[Path, str], folder: Path = DOCS / "methods") -> list[Path]:
    """Write what is stale and remove what is gone; which pages those were."""
    changed = stale(wanted, folder)
    for path in changed:
        if path in wanted:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
        else:
            path.unlink()
    return changed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page is stale")
    check = parser.parse_args().check
    changed = stale(pages()) if check else write(pages())
    for path in changed:
        print(("stale: " if check else "wrote " if path.exists() else "removed ") + path.relative_to(ROOT).as_posix())
    return int(check and bool(changed))


# ---- the catalogue ---------------------------------------------------------------------------------------------------


def catalogue(found: list[Card]) -> str:
    """What docs/catalogue.md lists."""
    parts = []
    for key, heading in KINDS.items():
        mine = [c for c in found if c.kind == key]
        parts.append(f"## {heading}\n")
        for family in sorted({c.fields.get("family", "general") for c in mine}, key=str.casefold):
            rows = [catalogue_row(c) for c in mine if c.fields.get("family", "general") == family]
            parts.append(
                f"### {family[0].upper() + family[1:]}\n\n"
                + table(("name", "what it does", "paper", "recipe", "evidence", "parity"), rows)
            )
    return "\n".join(parts)


def catalogue_row(card: Card) -> tuple[str, ...]:
    recipe_file, shown, kinds = recipe_of(card), measured(card), parity_kinds(card.slug)
    return (
        f"[{', '.join(card.provides)}](methods/{card.slug}.md)",
        prose(summary(card), in_table=True),
        " ".join(filter(None, (prose(card.fields.get("venue", ""), in_table=True), paper_link(card)))) or "–",
        f"[recipe](../{recipe_file.relative_to(ROOT).as_posix()})" if recipe_file else "–",
        f"[measured](methods/{card.slug}.md#evidence)" if shown else "–",
        str(len(kinds)) if kinds else "–",
    )


def method_page(card: Card) -> str:
    """docs/methods/<slug>.md."""
    facts = [
        (key, prose(value, in_table=True)) for key, value in card.fields.items() if key not in ("arxiv", "provides")
    ]
    facts += [("arXiv", paper_link(card))] if paper_link(card) else []
    if card.provides != (card.slug,):
        facts.append(("names in recipes", ", ".join(f"`{name}`" for name in card.provides)))
    parts = [f"{NOTE}# {prose(card.title)}\n", table(("", ""), facts), prose(card.text) + "\n" if card.text else ""]
    parts += [
        "## In a recipe\n",
        *usage(card),
        "## Options\n",
        *options(card),
        "## Evidence\n",
        claims_section(card),
        evidence_section(card),
        "## Parity\n",
        parity_section(card),
    ]
    parts.append(
        f"Source: [{card.module}](../../{card.file.relative_to(ROOT).as_posix()}). [All methods](../catalogue.md).\n"
    )
    return "\n".join(part for part in parts if part)


def usage(card: Card) -> Iterator[str]:
    """The recipe file, or, for an objective without one, its line in a recipe."""
    file = recipe_of(card)
    if file is not None:
        path = file.relative_to(ROOT).as_posix()
        names = list(recipe.read_yaml(file).get("variants") or {})
        yield (
            f"`stillhouse run {path}`"
            + (f" (variants: {', '.join(f'`{v}`' for v in names)})" if names else "")
            + f". This is [{path}](../../{path}):\n"
        )
        yield f"```yaml\n{file.read_text(encoding='utf-8').rstrip()}\n```\n"
    elif card.kind == "objective":
        entries = [
            yaml.safe_dump(
                {"name": n, **written(catalog.options(catalog.objective(n)))},
                default_flow_style=True,
                sort_keys=False,
                width=10_000,
            )
            for n in card.provides
        ]
        yield "It has no recipe of its own yet. Its line in any recipe, with its defaults:\n"
        yield "```yaml\nobjectives:\n" + "".join(f"  - {entry}" for entry in entries) + "```\n"
    else:
        yield "It has no recipe in this repository; its keys are below.\n"


def written(model: type[BaseModel]) -> dict[str, Any]:
    """An objective's options as a recipe would hold them; what must be given is shown as `…`."""
    values = {
        name: "…" if field.is_required() else field.get_default(call_default_factory=True)
        for name, field in model.model_fields.items()
    }
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v is not None}


def options(card: Card) -> Iterator[str]:
    if card.kind == "objective":
        for name in card.provides:
            cls = catalog.objective(name)
            keys = catalog.options(cls)
            weight = f"Default `weight`: {cls.default_weight:g}."
            heading = f"Of `{name}`. " if len(card.provides) > 1 else ""
            yield (
                f"{heading}{weight} `teacher`, `label` and schedules of the weight are those of every objective "
                "([ObjectiveSpec](../recipes.md#objectivespec)).\n"
            )
            words = argument_words(cls.__doc__ or "")
            rows = [
                (
                    f"`{n}`" + ("*" if f.is_required() else ""),
                    kind(f),
                    default(f),
                    prose(words.get(n, ""), in_table=True),
                )
                for n, f in keys.model_fields.items()
            ]
            yield table(("key", "type", "default", "what it is"), rows) if rows else "It has no options.\n"
        return
    config = catalog.method(card.slug).Config
    general = set(MethodConfig.model_fields)
    links = table_links(key_table(config, without=general))
    yield (
        f"Keys of a recipe with `method: {card.slug}`, besides `name`, `seed` and `variants`; the types that methods "
        "share are on [the recipe page](../recipes.md).\n"
    )
    yield links
    for own in own_types(config):
        yield f"### {own.__name__}\n\n{prose(' '.join((own.__doc__ or '').split()))}\n"
        yield table_links(key_table(own))


def table_links(text: str) -> str:
    """Links to shared types, which are on the recipe page."""
    for model in SHARED:
        text = text.replace(f"(#{model.__name__.lower()})", f"(../recipes.md#{model.__name__.lower()})")
    return text


def own_types(model: type[BaseModel], seen: tuple[type[BaseModel], ...] = ()) -> list[type[BaseModel]]:
    """Option types that a method's config holds and that are not shared, in order of appearance."""
    found: list[type[BaseModel]] = []
    for field in model.model_fields.values():
        for inner in leaves(field.annotation):
            if inner not in SHARED and inner not in found and inner not in seen:
                found += [inner, *(t for t in own_types(inner, (*seen, inner, *found)) if t not in found)]
    return found


def leaves(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from leaves(inner)


# ---- claims ----------------------------------------------------------------------------------------------------------


@cache
def library() -> Library:
    return Library.read(ROOT / "recipes", ROOT / "evidence")


@cache
def claims_of() -> dict[str, list[tuple[str, Verdict]]]:
    """The verdicts by card, each with the recipe that makes the claim."""
    out: dict[str, list[tuple[str, Verdict]]] = {}
    for recipe_name, verdicts in library().claimed().items():
        for verdict in verdicts:
            for slug in library().papers(recipe_name, verdict):
                out.setdefault(slug, []).append((recipe_name, verdict))
    return out


def claims_page(found: list[Card]) -> str:
    """What docs/claims.md lists: how many claims of each paper have which verdict, and then every claim."""
    mine = [(card, claims_of()[card.slug]) for card in found if card.slug in claims_of()]
    every = {(name, v) for _, claims in mine for name, v in claims}
    counts = [
        (
            f"[{card.slug}](#{card.slug})",
            *(str(sum(v.verdict == word for _, v in claims) or "") for word in MEANING),
            paper_link(card) or "–",
        )
        for card, claims in mine
    ]
    parts = [
        f"{len(mine)} papers, {len(every)} claims: {counted(v for _, v in every)}.\n",
        table(("paper", *MEANING, "arXiv"), counts),
    ]
    headers = ("claim", "expected", "measured", "verdict", "why", "recipe")
    for card, claims in mine:
        name = f"[{prose(summary(card), in_table=False)}](methods/{card.slug}.md)"
        parts.append(f"## {card.slug}\n\n{name} {card.fields.get('venue', '')} {paper_link(card)}".rstrip() + "\n")
        parts.append(table(headers, [claim_row(recipe_name, v) for recipe_name, v in claims]))
    return "\n".join(parts)


def claim_row(recipe_name: str, verdict: Verdict) -> tuple[str, ...]:
    path = library().recipes[recipe_name].relative_to(ROOT).as_posix()
    group = f" ({verdict.group})" if verdict.group else ""
    texts = (verdict.says + group, verdict.expected, verdict.measured)
    word = f"**{verdict.verdict}**" if verdict.verdict == SHOWN else verdict.verdict
    why = prose(verdict.why, in_table=True) or "–"
    return (*(prose(text, in_table=True) for text in texts), word, why, f"[{Path(recipe_name).stem}](../{path})")


def claims_section(card: Card) -> str:
    """What was shown of a paper's claims, what was not and why, and where a user starts."""
    claims = claims_of().get(card.slug, [])
    if not claims:
        return ""
    lines = [f"Of the paper's claims here: {counted(v for _, v in claims)}. [All claims](../claims.md#{card.slug}).\n"]
    for word in MEANING:
        for _, v in claims:
            if v.verdict == word:
                group = f" ({v.group})" if v.group else ""
                measured = "" if v.mean is None else f" Measured: {v.measured}."
                lines.append(
                    f"- **{word[0].upper() + word[1:]}**{group}: {prose(v.says)} Expected: "
                    f"{prose(v.expected)}.{measured} {prose(v.why)}".rstrip()
                )
    return "\n".join([*lines, "", where_to_start(claims), ""])


def where_to_start(claims: list[tuple[str, Verdict]]) -> str:
    """The command of the first claim that was shown; where none was, the row to compare with first."""
    shown = [(name, v) for name, v in claims if v.verdict == SHOWN]
    name, first = (shown or claims)[0]
    row = row_name(first.of, library().trees[name])
    path = library().recipes[name].relative_to(ROOT).as_posix()
    command = f"`stillhouse run {path}" + (f" --variant {row.variant}" if row.variant != "base" else "") + "`"
    if shown:
        return f"Where to start: {command}, the setting of the first claim that was shown."
    against = f" against its baseline `{first.over}`" if first.over else ""
    return (
        f"Where to start: no claim was shown in these settings, so try {command}{against} on your own data before you "
        "rely on it."
    )


def evidence_section(card: Card) -> str:
    shown = measured(card)
    if not shown:
        return "Not measured yet.\n"
    return "\n".join(comparison(path, heading=len(shown) > 1 or path.stem != card.slug, of=card) for path in shown)


def whole_comparison() -> str:
    """All objectives on one budget, group by group, best first."""
    path = ROOT / "evidence" / "objectives.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    mean = lambda row: sum(row["metrics"]["accuracy"]) / len(row["seeds"])  # noqa: E731
    parts = []
    for group in dict.fromkeys(row.get("group") for row in found["rows"]):
        rows = [{k: v for k, v in row.items() if k != "group"} for row in found["rows"] if row.get("group") == group]
        one = {**found, "rows": sorted(rows, key=mean, reverse=True)}
        parts.append(f"## Student: {group}\n\n{comparison_markdown(without_idle_columns(one))}")
    made = f"`{found['command']}`, {found['created'][:10]}, {found['device']}, torch {found['versions']['torch']}."
    return "\n".join(parts) + f"\n{made} All figures: [evidence/objectives.json](../evidence/objectives.json).\n"


def comparison(path: Path, heading: bool, of: Card) -> str:
    """The table of an evidence file, how it was made, and a link to all its figures. Of a comparison of many methods:
    this one's rows and the baselines'."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if path.stem != of.slug and len(found["rows"]) > 20:
        named = {found.get("baseline"), found.get("reference")}
        found["rows"] = [row for row in found["rows"] if row["label"] in named or names_of(row) & set(of.provides)]
        whole = (
            "data-set distillation](../synthetic-tables.md)"
            if path.stem.startswith("cifar10")
            else "all objectives](../comparison.md)"
        )
        found["note"] = f"Of [the comparison of {whole}, the rows of this one and of the baselines."
    made = [
        f"`{re.sub(r' --(out|data-root)[= ][^ ]+', '', found['command'])}`" if found.get("command") else "",
        str(found.get("created") or "")[:10],
        str(found.get("device") or ""),
        ", ".join(f"{k} {v}" for k, v in (found.get("versions") or {}).items() if k in ("stillhouse", "torch")),
    ]
    title = f"### {found.get('title') or path.stem}\n\n" if heading else ""
    note = f"{prose(str(found['note']))}\n\n" if found.get("note") else ""
    return (
        f"{title}{note}{comparison_markdown(without_idle_columns(found))}\n{', '.join(filter(None, made))}. All "
        f"figures: [evidence/{path.name}](../../evidence/{path.name}).\n"
    )


def without_idle_columns(found: dict[str, Any]) -> dict[str, Any]:
    """A comparison without the figures in which its rows do not differ, and without those that say little on a page."""
    names = {name for row in found["rows"] for name in row["metrics"]}
    values = {n: {v for row in found["rows"] for v in row["metrics"].get(n, ())} for n in names}
    idle = {n for n in names if len(values[n]) == 1} - {"accuracy", found.get("primary")}
    idle |= {"accuracy_top5", "brier", "latency_ms", "file_bytes", "run_seconds"} - {found.get("primary")}

    def kept(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "metrics": {k: v for k, v in row["metrics"].items() if k not in idle}}

    return {
        **found,
        "rows": [kept(row) for row in found["rows"]],
        "teacher": kept(found["teacher"]) if found.get("teacher") else None,
    }


def parity_section(card: Card) -> str:
    kinds = parity_kinds(card.slug)
    if not kinds:
        return "There are no arrays of the authors' code that it is compared with.\n"
    count = "one kind" if len(kinds) == 1 else f"{len(kinds)} kinds"
    return (
        f"It is compared with arrays of the authors' code in {count} of case: {', '.join(f'`{k}`' for k in kinds)}.\n"
    )


# ---- what is known of a card -----------------------------------------------------------------------------------------


def recipe_of(card: Card) -> Path | None:
    """recipes/**/<slug>.yaml."""
    return next(iter(sorted((ROOT / "recipes").rglob(f"{card.slug}.yaml"))), None)


def measured(card: Card) -> list[Path]:
    """evidence/<slug>.json, and comparisons of several methods (files that are named after no method) in which it is a
    row."""
    folder = ROOT / "evidence"
    own = [p for p in (folder / f"{card.slug}.json",) if p.is_file()]
    return own + [
        p for p in sorted(folder.glob("*.json")) if p.stem not in catalog.cards() and names_in(p) & set(card.provides)
    ]


@cache
def names_in(path: Path) -> frozenset[str]:
    """The objectives and methods that the rows of an evidence file ran, as their recipes say; `ce` alone is in all and
    left out."""
    return frozenset(name for row in json.loads(path.read_text(encoding="utf-8"))["rows"] for name in names_of(row))


def names_of(row: dict[str, Any]) -> set[str]:
    """The same of one row."""
    names: set[str] = set()
    for file in (ROOT / "recipes").rglob(str(row.get("recipe"))):
        tree = recipe.resolve(recipe.read_yaml(file), row.get("variant"))
        names |= {
            tree.get("method", "distillation"),
            *(o if isinstance(o, str) else o["name"] for o in tree.get("objectives") or []),
        }
    return names - {"ce", "distillation"}


def parity_kinds(slug: str) -> list[str]:
    """Kinds of the authors' arrays that an adapter compares with."""
    if not (ROOT / "tests" / "parity" / "adapters" / f"{slug}.py").is_file():
        return []
    if str(ROOT / "tests") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests"))
    return sorted(importlib.import_module(f"parity.adapters.{slug}").ADAPTERS)


def summary(card: Card) -> str:
    text = card.title.partition(": ")[2] or card.title
    return text[0].upper() + text[1:]


def paper_link(card: Card) -> str:
    number = card.fields.get("arxiv", "").split(" ")[0].rstrip(",;")
    return f"[{number}](https://arxiv.org/abs/{number})" if re.fullmatch(r"\d{4}\.\d{4,5}", number) else ""


if __name__ == "__main__":
    sys.exit(main())
