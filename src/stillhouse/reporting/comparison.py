"""A comparison of methods over seeds, from the JSON of a bench: as an HTML report, a table for the terminal, and Markdown.

All three show the same rows, worked out once by `compare`: mean ± sample standard deviation, and the difference from the baseline, paired by seed,
with a 95 % t interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.errors import UserError, unknown
from stillhouse.evaluation.statistics import Difference, mean, mean_interval, paired_difference, standard_deviation
from stillhouse.reporting.page import Cell, cards, code, figure, folded, grid, legend, page, pairs, section, table, write
from stillhouse.reporting.quantities import Quantity, in_reading_order, quantity

if TYPE_CHECKING:
    import rich.table


@dataclass(frozen=True)
class Row:
    """One method: its seeds, its figures by name (a value per seed; NaN where there is none), and its gain over the baseline (None: none to give)."""

    label: str
    seeds: tuple[int, ...]
    figures: dict[str, list[float]]
    gain: Difference | None

    def values(self, name: str) -> list[float]:
        """The values of a figure over the seeds that have it."""
        return [v for v in self.figures.get(name, []) if not math.isnan(v)]


@dataclass(frozen=True)
class Comparison:
    """Rows ready to be shown. `primary` is the figure that methods are compared by; gains are positive where a method is better."""

    title: str
    primary: str
    shown: dict[str, Quantity]  # how each figure is shown, in reading order, the primary one first
    rows: list[Row]
    baseline: str | None
    teacher: Row | None
    note: str

    def headers(self) -> list[str]:
        """Titles of the table's columns, with units."""
        headers = [q.header for q in self.shown.values()]
        if self.baseline is not None:
            unit = self.shown[self.primary].difference_unit
            headers.insert(1, f"Gain over {self.baseline}" + (f" ({unit})" if unit else ""))
        return ["Method", *headers]

    def cells(self) -> list[list[Cell]]:
        """The table, a list of cells for each row; the teacher, where there is one, comes last."""
        return [self._cells(row) for row in [*self.rows, *([self.teacher] if self.teacher else [])]]

    def _cells(self, row: Row) -> list[Cell]:
        cells = [_spread_cell(q, row.values(name)) for name, q in self.shown.items()]
        if self.baseline is not None:
            is_baseline = row.label == self.baseline and row is not self.teacher
            cells.insert(1, Cell("baseline", 0.0) if is_baseline else _gain_cell(self.shown[self.primary], row.gain))
        return [Cell(row.label), *cells]


def compare(results: Mapping[str, Any]) -> Comparison:
    """Work out the rows of a bench's results.

    Args:
        results: `rows`, each with `label`, `seeds` and `metrics` (name -> a value per seed; None where a seed failed), and where known `title`, `slug`,
            `baseline` (a row's label), `teacher` (`label`, `metrics`: name -> value), `primary` (the figure to compare by; default `accuracy`,
            or the first that there is).

    Raises:
        UserError: no rows, no figures, a baseline or primary figure that is not there, or not as many values as seeds.
    """
    given = results.get("rows") or []
    if not given:
        raise UserError("There is nothing to compare: the results have no rows.")
    figures = [_figures_by_seed(row) for row in given]
    names = in_reading_order({n for f in figures for n, by_seed in f.items() if any(not math.isnan(v) for v in by_seed.values())})
    primary = results.get("primary") or ("accuracy" if "accuracy" in names or not names else names[0])
    if primary not in names:
        raise unknown("figure in these results", primary, names)
    baseline = results.get("baseline")
    labels = [row["label"] for row in given]
    if baseline is not None and baseline not in labels:
        raise unknown("row for the baseline", baseline, labels)

    against = figures[labels.index(baseline)].get(primary, {}) if baseline is not None else {}
    rows = [
        Row(
            label,
            tuple(row["seeds"]),
            {n: list(by_seed.values()) for n, by_seed in f.items()},
            None if label == baseline else _gain(f.get(primary, {}), against, quantity(primary)),
        )
        for label, row, f in zip(labels, given, figures)
    ]
    given_teacher = results.get("teacher") or {}
    teacher = _teacher(given_teacher) if given_teacher.get("metrics") else None
    every = [*rows, *([teacher] if teacher else [])]
    return Comparison(
        title=results.get("title") or results.get("slug") or "Comparison",
        primary=primary,
        shown={n: quantity(n, max((abs(v) for row in every for v in row.values(n)), default=0.0)) for n in sorted(names, key=lambda n: n != primary)},
        rows=rows,
        baseline=baseline,
        teacher=teacher,
        note=_note(rows, baseline),
    )


def comparison_table(results: Mapping[str, Any]) -> rich.table.Table:
    """The comparison for a terminal: the columns in which the methods differ, with the note as the caption."""
    import rich.box
    import rich.table
    from rich.text import Text

    comparison = compare(results)
    texts = [[c.text for c in cells] for cells in comparison.cells()]
    methods = texts[: len(comparison.rows)]
    first = 2 + (comparison.baseline is not None)  # method, primary figure, gain: always there
    keep = [i for i in range(len(texts[0])) if i < first or len({row[i] for row in methods}) > 1]
    title, caption = Text(comparison.title), Text(comparison.note)
    out = rich.table.Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    headers = comparison.headers()
    for i in keep:
        out.add_column(Text(headers[i]), justify="right" if i else "left", no_wrap=0 < i < first)
    for row in texts:
        out.add_row(*(Text(row[i]) for i in keep))
    return out


def comparison_markdown(results: Mapping[str, Any]) -> str:
    """The comparison as a Markdown table, with the note under it."""
    comparison = compare(results)
    headers = comparison.headers()
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *([c.text for c in cells] for cells in comparison.cells())]
    body = "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)
    return f"{body}\n\n{comparison.note}\n"


def write_comparison_report(results: Mapping[str, Any], path: Path) -> Path:
    """Write the comparison as one HTML file that needs no network. Returns its path; raises as `compare`."""
    comparison = compare(results)
    shown = comparison.shown[comparison.primary]
    labels = [row.label for row in comparison.rows]
    marked = [labels.index(comparison.baseline)] if comparison.baseline is not None else []
    body = [
        section(
            "At a glance", f"{shown.title}: {shown.meaning or 'the figure that the methods are compared by.'}", cards(_glance(comparison, shown))
        ),
        section(
            "All figures",
            f"{comparison.note} Click on a header to sort.",
            table(comparison.headers(), comparison.cells(), marked),
            _glossary(comparison),
        ),
        *_plots(comparison, shown),
        *_origin(results),
    ]
    about = [str(results[k]) for k in ("slug", "created", "device") if results.get(k)]
    return write(path, page(comparison.title, " · ".join(about), body))


def _figures_by_seed(row: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    out = {}
    for name, values in row["metrics"].items():
        if len(values) != len(row["seeds"]):
            raise UserError(f"Row '{row['label']}': '{name}' has {len(values)} values for {len(row['seeds'])} seeds.")
        out[name] = {seed: math.nan if v is None else float(v) for seed, v in zip(row["seeds"], values)}
    return out


def _gain(values: Mapping[int, float], baseline: Mapping[int, float], shown: Quantity) -> Difference | None:
    """How much better than the baseline, over the seeds that both have."""
    both = [s for s in values if s in baseline and not math.isnan(values[s] + baseline[s])]
    if not both:
        return None
    sign = -1 if shown.better < 0 else 1
    return paired_difference([sign * values[s] for s in both], [sign * baseline[s] for s in both])


def _teacher(given: Mapping[str, Any]) -> Row:
    as_list = {n: v if isinstance(v, Sequence) else [v] for n, v in given["metrics"].items()}
    label = str(given.get("label", "teacher"))
    return Row(
        label if "teacher" in label.lower() else f"{label} (teacher)",
        (),
        {n: [float(x) for x in v if x is not None] for n, v in as_list.items()},
        None,
    )


def _note(rows: Sequence[Row], baseline: str | None) -> str:
    counts = sorted({len(row.seeds) for row in rows})
    if counts == [1]:
        return "One seed for each method, so neither spread nor interval can be given: a difference may be chance."
    seeds = f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    gain = (
        f" The gain over {baseline} is paired by seed, with its 95 % t interval in brackets; an interval that holds 0 may be chance."
        if baseline
        else ""
    )
    return f"Mean ± sample standard deviation over {seeds} for each method.{gain}"


def _spread_cell(shown: Quantity, values: Sequence[float]) -> Cell:
    if not values:
        return Cell("–", math.nan)
    centre, spread = mean(values), standard_deviation(values)
    varies = spread > 1e-12 * abs(centre)  # False for NaN: one value
    return Cell(shown.digits(centre) + (f" ± {shown.digits(spread, like=centre)}" if varies else ""), centre)


def _gain_cell(shown: Quantity, gain: Difference | None) -> Cell:
    if gain is None:
        return Cell("–", math.nan)
    interval = "" if math.isnan(gain.low) else f" [{shown.signed(gain.low)}, {shown.signed(gain.high)}]"
    return Cell(shown.signed(gain.mean) + interval, gain.mean)


def _glance(comparison: Comparison, shown: Quantity) -> list[tuple[str, str, str]]:
    """Cards: the teacher, the baseline, and each other method, best first (at most four)."""
    out = []
    if comparison.teacher and (values := comparison.teacher.values(comparison.primary)):
        out.append((comparison.teacher.label, shown.text(mean(values)), "The teacher: what the students learn from."))
    scored = [row for row in comparison.rows if row.values(comparison.primary)]
    out += [
        (row.label, shown.text(mean(row.values(comparison.primary))), "The baseline: what the others are measured against.")
        for row in scored
        if row.label == comparison.baseline
    ]
    others = sorted(
        (row for row in scored if row.label != comparison.baseline), key=lambda row: mean(row.values(comparison.primary)), reverse=shown.better >= 0
    )
    for row in others[:4]:
        why = ""
        if row.gain is not None:
            why = f"{shown.signed(row.gain.mean)} {shown.difference_unit}".strip() + f" over {comparison.baseline}"
            why += (
                "."
                if math.isnan(row.gain.low)
                else f"; the interval {'holds 0: may be chance' if row.gain.low <= 0 <= row.gain.high else 'does not hold 0'}."
            )
        out.append((row.label, shown.text(mean(row.values(comparison.primary))), why))
    return out


def _glossary(comparison: Comparison) -> str:
    meanings = {q.header: q.meaning for q in comparison.shown.values() if q.meaning}
    return folded("What the columns mean", pairs(meanings)) if meanings else ""


def _plots(comparison: Comparison, shown: Quantity) -> list[str]:
    from stillhouse.reporting.figures import TEACHER, Spread, dots, styles, trade

    style = styles([row.label for row in comparison.rows])
    teacher = comparison.teacher

    def spreads(name: str) -> dict[str, Spread]:
        out = {}
        for row in comparison.rows:
            if values := row.values(name):
                low, high = mean_interval(values)
                out[row.label] = Spread(values, mean(values), 0.0 if math.isnan(low) else (high - low) / 2)
        return out

    def of_teacher(name: str) -> float:
        return mean(teacher.values(name)) if teacher else math.nan

    def dot_plot(name: str) -> str:
        line = (teacher.label, of_teacher(name)) if teacher and not math.isnan(of_teacher(name)) else None
        text = f"{comparison.shown[name].title} of each method: every seed (ring), the mean (filled) and its 95 % t interval (bar)" + (
            "; dashed: the teacher." if line else "."
        )
        return figure(dots(spreads(name), comparison.shown[name], style, line), f"dots-{name}", text)

    out = [
        section(
            f"{shown.title}, seed by seed",
            "Methods whose points mix can hardly be told apart; those that stand clear can.",
            dot_plot(comparison.primary),
        )
    ]
    quality = spreads(comparison.primary)
    costs = []
    for name in (n for n in ("parameters", "multiply_adds", "train_seconds") if n in comparison.shown):
        cost = comparison.shown[name]
        points = {row.label: (mean(row.values(name)), quality[row.label]) for row in comparison.rows if row.values(name) and row.label in quality}
        star = (teacher.label, of_teacher(name), of_teacher(comparison.primary)) if teacher else None
        if star and math.isnan(star[1] + star[2]):
            star = None
        if len({value for value, _ in points.values()} | ({star[1]} if star else set())) > 1:
            text = f"{shown.title} against {cost.title.lower()}. {cost.meaning}"
            costs.append(figure(trade(points, cost, shown, style, star), f"cost-{name}", text))
    if costs:
        marks = [(look.mark, look.color, label) for label, look in style.items()]
        if teacher:
            marks.append((TEACHER.mark, TEACHER.color, teacher.label))
        text = "The best place is the upper left: good at a low price. Bars are 95 % t intervals of the mean."
        out.append(section("Quality against cost", text, legend(marks), grid(costs)))
    if "ece" in comparison.shown and comparison.primary != "ece":
        out.append(section("Calibration", comparison.shown["ece"].meaning, dot_plot("ece")))
    return out


def _origin(results: Mapping[str, Any]) -> list[str]:
    """How to make this comparison again."""
    content = code(results["command"]) if results.get("command") else ""
    recipes = {row["label"]: " · ".join(str(row[k]) for k in ("recipe", "variant") if row.get(k)) for row in results["rows"]}
    for title, items in (("Recipes", {k: v for k, v in recipes.items() if v}), ("Versions", results.get("versions") or {})):
        if items:
            content += f"<h3>{title}</h3>{pairs(items)}"
    return (
        [section("How it was made", "The command, the recipes (with their variants) and the versions that gave these figures.", content)]
        if content
        else []
    )
