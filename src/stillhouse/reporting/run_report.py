"""The report of one run: its figures, its training curves, its recipe and its machine, from the files of the
run's folder."""

from __future__ import annotations

import csv
import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stillhouse.errors import UserError
from stillhouse.evaluation.quantities import in_reading_order, quantity
from stillhouse.reporting.headline import against_teacher, primary_of
from stillhouse.reporting.page import (
    cards,
    code,
    figure,
    gallery,
    grid,
    labelled_picture,
    page,
    pairs,
    picture,
    section,
    write,
)

Curve = tuple[list[float], list[float]]
_POSITION = ("stage", "epoch", "step")
_MOST_POINTS = 2000
_COST = ("stored_images", "distil_iterations", "distil_seconds_per_iteration")
_QUALITY = ("lrs", "ars", "hlr", "ior", "improvement_over_random", "gain_over_scratch")


def write_run_report(folder: str | Path) -> Path:
    """Write `report.html` into a run's folder: one file that needs no network. What the run has not (yet) written is
    left out.

    Args:
        folder: may hold `recipe.yaml`, `environment.json`, `metrics.csv`, `evaluation.json` and `product/product.json`.

    Returns:
        The path of the report.

    Raises:
        UserError: a folder that is not there or holds none of these, or a file that cannot be read.
    """
    folder = Path(folder)
    recipe = _text(folder / "recipe.yaml")
    environment = _json(folder / "environment.json")
    evaluation = _json(folder / "evaluation.json")
    product = _json(folder / "product" / "product.json")
    curves = read_curves(folder / "metrics.csv")
    if not (recipe or environment or evaluation or product or curves):
        raise UserError(
            f"There is no run in '{folder}' to report: no recipe.yaml, environment.json, metrics.csv, evaluation.json "
            "or product."
        )

    body = []
    teachers = (environment or {}).pop("teachers", None) or {}
    if evaluation and "stored_images" in evaluation:
        body += _of_a_set(evaluation, product or {}, folder / "product" / "sheet.png")
    elif evaluation:
        body.append(
            section(
                "Results",
                _headline(evaluation, teachers) + "What the finished product does on test data, and what it costs.",
                cards(_shown(evaluation)),
            )
        )
    body += _gallery(folder / "pictures")
    for name, figures in teachers.items():
        facts = {title: value for title, value, _ in _shown(figures)}
        body.append(
            section(f"Teacher: {name}", "The network that the student learned from, judged on test data.", pairs(facts))
        )
    body += _training(curves)
    if product:
        body.append(
            section(
                "Product",
                "What the run left to keep, in the folder product/.",
                pairs(_flat({k: v for k, v in product.items() if k != "made_by"})),
            )
        )
    if recipe:
        body.append(
            section(
                "Recipe", "Every option of this run, defaults included; a run of this recipe repeats it.", code(recipe)
            )
        )
    if environment:
        body.append(_environment(environment))
    title, subtitle = _names(recipe, folder)
    return write(folder / "report.html", page(title, subtitle, body))


def _headline(evaluation: Mapping[str, Any], teachers: Mapping[str, Mapping[str, Any]]) -> str:
    """A sentence on the student against the only teacher; "" where there are several or none."""
    figures = {k: v for k, v in evaluation.items() if isinstance(v, int | float)}
    primary = primary_of(figures)
    if len(teachers) != 1 or primary is None:
        return ""
    text = against_teacher(figures, next(iter(teachers.values())), primary)
    return f"The student is {text}. " if text else ""


def _gallery(folder: Path) -> list[str]:
    """A section of test samples as the truth, the student and the teacher have them."""
    found = _json(folder / "pictures.json")
    if not found:
        return []
    rows = []
    for sample in found["samples"]:
        cells: list[tuple[bytes | None, list[str]]] = []
        for name, shown in sample["shown"].items():
            line = f"{name}: {shown['caption']}" if shown["caption"] else name
            if shown["file"] or not cells:
                cells.append(((folder / shown["file"]).read_bytes() if shown["file"] else None, [line]))
            else:
                cells[-1][1].append(line)  # the picture is the one before
        rows.append("".join(labelled_picture(png, lines) for png, lines in cells))
    how = "on which student and teacher differ most" if found["compared"] else "first in the test set"
    return [
        section("Pictures", f"Test samples {how}; with each, what is right and what each network finds.", gallery(rows))
    ]


def _of_a_set(evaluation: Mapping[str, Any], product: Mapping[str, Any], sheet: Path) -> list[str]:
    """The sections of a synthetic set: what networks learn from it, the images themselves, what it cost."""
    cost = {k: v for k, v in evaluation.items() if k in _COST or k.endswith(("_seconds", "_mb"))}
    rest = {k: v for k, v in evaluation.items() if k not in cost and not (k.endswith("_std") and not v)}
    quality = {k: v for k, v in rest.items() if k in _QUALITY or k.startswith(("accuracy", "continual", "search"))}
    out = [
        section("Results", "What networks learn from the set alone, judged on real test data.", cards(_shown(quality)))
    ]
    if sheet.is_file():
        out.append(
            section("The images", _sheet_text(product), picture(sheet.read_bytes(), "The contact sheet of the set"))
        )
    out.append(section("Cost", "What it took to make the set, and what it takes to keep.", cards(_shown(cost))))
    if other := {k: v for k, v in rest.items() if k not in quality}:
        out.append(
            section("More about the set", "Figures that this method gives of its own work.", cards(_shown(other)))
        )
    return out


def _sheet_text(product: Mapping[str, Any]) -> str:
    if not product.get("classes"):
        return "The first images of the set."
    clipped = "" if product.get("bounded", True) else " Pixels out of range are shown clipped."
    return f"The first images of each class, in the order of the classes: {_listed(product['classes'])}.{clipped}"


def _brief(product: Mapping[str, Any]) -> dict[str, Any]:
    """What product.json says, without what is empty and without the recipe, which has a section of its own."""
    flat = _flat({k: v for k, v in product.items() if k != "made_by" and v is not None})
    return {k: _listed(v) if isinstance(v, list) else v for k, v in flat.items()}


def _listed(items: list[Any]) -> str:
    return ", ".join(map(str, items[:20])) + (f" … ({len(items)} in all)" if len(items) > 20 else "")


def read_curves(path: Path) -> dict[str, dict[str, Curve]]:
    """The curves of a metrics file: stage -> name -> (steps, values). Empty cells are skipped; a file that is not there
    gives none.

    The columns are `stage`, `epoch`, `step` and then one a figure. Long curves are thinned to 2,000 points, the last
    one kept.
    """
    if not path.is_file():
        return {}
    out: dict[str, dict[str, Curve]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for i, row in enumerate(csv.DictReader(file)):
            at = next((x for x in (_number(row.get("step")), _number(row.get("epoch"))) if x is not None), float(i))
            for name, cell in row.items():
                value = _number(cell) if name and name not in _POSITION else None
                if value is not None:
                    xs, ys = out.setdefault(row.get("stage") or "", {}).setdefault(name, ([], []))
                    xs.append(at)
                    ys.append(value)
    return {stage: {name: _thin(curve) for name, curve in curves.items()} for stage, curves in out.items()}


def _training(curves: Mapping[str, Mapping[str, Curve]]) -> list[str]:
    """A section a stage: the terms of the loss together, then every other figure by itself."""
    if not curves:
        return []
    from stillhouse.reporting.figures import lines

    out = []
    for i, (stage, by_name) in enumerate(curves.items()):
        losses = {n: c for n, c in by_name.items() if "/" not in n and n != "lr"}
        # The total first, so that it has the first colour.
        losses = dict(sorted(losses.items(), key=lambda item: item[0] != "loss"))
        figures = []
        if losses:
            text = "The loss, and its terms before they are weighted." if len(losses) > 1 else "The loss."
            figures.append(figure(lines(losses, "optimiser step", "loss", may_be_log=True), f"loss-{i}", text))
        for n, (name, (xs, ys)) in enumerate((n, c) for n, c in by_name.items() if n not in losses):
            shown = quantity(name)
            where = (
                "Learning rate"
                if name == "lr"
                else f"{shown.title} ({name.rsplit('/', 1)[0]})"
                if "/" in name
                else shown.title
            )
            meaning = (
                "How large the optimiser's steps are."
                if name == "lr"
                else shown.meaning.replace("test samples", "samples")
            )
            fig = lines(
                {name: (xs, [y * shown.scale for y in ys])}, "optimiser step", "lr" if name == "lr" else shown.header
            )
            figures.append(figure(fig, f"figure-{i}-{n}", f"{where}. {meaning}".strip()))
        title = f"Training: {stage}" if stage else "Training"
        out.append(section(title, "How training went, from its first step to its last.", grid(figures)))
    return out


def _shown(figures: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Named figures as (title, value, meaning): numbers in their units, anything else as it is."""
    items, flat = [], _flat(figures)
    for name in in_reading_order(set(flat)):
        value = flat[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        shown = quantity(name, value if number else 0.0)
        title = shown.title + (f" ({name.rsplit('/', 1)[0]})" if "/" in name else "")
        items.append((title, shown.text(value) if number else str(value), shown.meaning))
    return items


def _environment(environment: Mapping[str, Any]) -> str:
    rest = dict(environment)
    command, versions = rest.pop("command", None), rest.pop("versions", None)
    content = code(command if isinstance(command, str) else shlex.join(map(str, command))) if command else ""
    if rest:
        content += pairs(_flat(rest))
    if isinstance(versions, Mapping):
        content += f"<h3>Versions</h3>{pairs(versions)}"
    return section("Where it was made", "The command, the machine and the versions behind these figures.", content)


def _names(recipe: str | None, folder: Path) -> tuple[str, str]:
    """Title and subtitle from the recipe, as far as it can be read."""
    try:
        tree = yaml.safe_load(recipe or "")
    except yaml.YAMLError:
        tree = None
    tree = tree if isinstance(tree, dict) else {}

    def named(key: str, inner: str) -> str | None:
        value = tree.get(key)
        value = value.get(inner) if isinstance(value, dict) else value
        return f"{key} {value}" if value else None

    parts = [
        f"method {tree['method']}" if tree.get("method") else None,
        named("student", "model"),
        named("network", "model"),
        f"ipc {tree['ipc']}" if tree.get("ipc") else None,
        named("data", "name"),
        f"seed {tree['seed']}" if tree.get("seed") is not None else None,
    ]
    return str(tree.get("name") or folder.resolve().name), " · ".join(p for p in parts if p)


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by a slash."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        out.update(_flat(value, f"{above}{name}/") if isinstance(value, Mapping) else {f"{above}{name}": value})
    return out


def _thin(curve: Curve) -> Curve:
    xs, ys = curve
    stride = math.ceil(len(xs) / _MOST_POINTS)
    if stride <= 1:
        return curve
    keep = sorted({*range(0, len(xs), stride), len(xs) - 1})
    return [xs[i] for i in keep], [ys[i] for i in keep]


def _number(cell: Any) -> float | None:
    """A cell as a number; None for an empty, torn or non-finite one."""
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None


def _json(path: Path) -> dict[str, Any] | None:
    text = _text(path)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold an object of names and values, but holds {type(value).__name__}.")
    return value
