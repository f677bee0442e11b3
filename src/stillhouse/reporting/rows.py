"""The rows of a comparison, worked out once from the JSON of a bench: figures over seeds, and the gain over the
baseline, paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stillhouse.errors import UserError, unknown
from stillhouse.evaluation.quantities import Quantity, in_reading_order, quantity
from stillhouse.evaluation.statistics import Difference, mean, paired_difference, standard_deviation
from stillhouse.reporting.headline import primary_of
from stillhouse.reporting.page import Cell

MORE_TELLING = {"step_relative": ("step_ms", "step_ratio"), "step_memory_relative": ("step_bytes",)}
"""Figures that are not shown where a more telling one is there."""


@dataclass(frozen=True)
class Row:
    """One method: its seeds, its figures by name (a value per seed; NaN where there is none), and its gain over the
    baseline (None: none to give)."""

    label: str
    seeds: tuple[int, ...]
    figures: dict[str, list[float]]
    gain: Difference | None
    group: str | None = None  # where a comparison has several, such as students: the baseline is the group's own

    def values(self, name: str) -> list[float]:
        """The values of a figure over the seeds that have it."""
        return [v for v in self.figures.get(name, []) if not math.isnan(v)]


@dataclass(frozen=True)
class Comparison:
    """Rows ready to be shown. `primary` is the figure that methods are compared by; gains are positive where a method
    is better."""

    title: str
    primary: str
    shown: dict[str, Quantity]  # how each figure is shown, in reading order, the primary one first
    rows: list[Row]
    baseline: str | None
    teacher: Row | None
    note: str

    @property
    def groups(self) -> list[str]:
        """Names of the groups in the order of the rows; empty where there is one comparison only."""
        return list(dict.fromkeys(row.group for row in self.rows if row.group is not None))

    def only(self, group: str) -> Comparison:
        """The comparison within one group, as if there were no other."""
        return replace(self, rows=[replace(row, group=None) for row in self.rows if row.group == group])

    def headers(self) -> list[str]:
        """Titles of the table's columns, with units."""
        headers = [q.header for q in self.shown.values()]
        if self.baseline is not None:
            unit = self.shown[self.primary].difference_unit
            headers.insert(1, f"Gain over {self.baseline}" + (f" ({unit})" if unit else ""))
        return ["Method", *(["Group"] if self.groups else []), *headers]

    def cells(self) -> list[list[Cell]]:
        """The table, a list of cells for each row; the teacher, where there is one, comes last."""
        return [self._cells(row) for row in [*self.rows, *([self.teacher] if self.teacher else [])]]

    def _cells(self, row: Row) -> list[Cell]:
        cells = [_spread_cell(q, row.values(name)) for name, q in self.shown.items()]
        if self.baseline is not None:
            is_baseline = row.label == self.baseline and row is not self.teacher
            cells.insert(1, Cell("baseline", 0.0) if is_baseline else _gain_cell(self.shown[self.primary], row.gain))
        return [Cell(row.label), *([Cell(row.group or "–")] if self.groups else []), *cells]


def compare(results: Mapping[str, Any]) -> Comparison:
    """Work out the rows of a bench's results.

    Args:
        results: `rows`, each with `label`, `seeds` and `metrics` (name -> a value per seed; None where a seed failed),
            and where known `title`, `slug`, `baseline` (a row's label), `teacher` (`label`, `metrics`: name -> value),
            `primary` (the figure to compare by; default `accuracy`, or the first that there is), and `reference` (the
            row whose step is the unit of the relative costs). Rows may have a `group`: a row is compared with the
            baseline of its own.

    Raises:
        UserError: no rows, no figures, a baseline or primary figure that is not there, or not as many values as seeds.
    """
    given = results.get("rows") or []
    if not given:
        raise UserError("There is nothing to compare: the results have no rows.")
    figures = [_figures_by_seed(row) for row in given]
    names = {n for f in figures for n, by_seed in f.items() if any(not math.isnan(v) for v in by_seed.values())}
    primary = results.get("primary") or primary_of(names) or "accuracy"
    if primary not in names:
        raise unknown("figure in these results", primary, in_reading_order(names))
    baseline = results.get("baseline")
    labels = [row["label"] for row in given]
    if baseline is not None and baseline not in labels:
        raise unknown("row for the baseline", baseline, labels)

    names -= {hidden for n, less in MORE_TELLING.items() if n in names for hidden in less}
    baselines = {row.get("group"): (row, f) for row, f in zip(given, figures) if row["label"] == baseline}
    reasons = []
    rows = []
    for row, f in zip(given, figures):
        gain = None
        if row["label"] != baseline and row.get("group") in baselines:
            other, theirs = baselines[row.get("group")]
            gain = _gain(f.get(primary, {}), theirs.get(primary, {}), quantity(primary))
            reason = unequal(row, other)
            if gain is not None and reason is not None:
                reasons.append(reason)
                gain = Difference(gain.mean, math.nan, math.nan, gain.n)
        shown = {n: list(by_seed.values()) for n, by_seed in f.items() if n in names}
        rows.append(Row(row["label"], tuple(row["seeds"]), shown, gain, row.get("group")))
    given_teacher = results.get("teacher") or {}
    teacher = _teacher(given_teacher) if given_teacher.get("metrics") else None
    every = [*rows, *([teacher] if teacher else [])]
    return Comparison(
        title=results.get("title") or results.get("slug") or "Comparison",
        primary=primary,
        shown={
            n: _named(
                quantity(n, max((abs(v) for row in every for v in row.values(n)), default=0.0)),
                results.get("reference"),
            )
            for n in sorted(in_reading_order(names), key=lambda n: n != primary)
        },
        rows=rows,
        baseline=baseline,
        teacher=teacher,
        note=" ".join([_note(rows, baseline), *([f"No interval where {'; '.join(reasons)}."] if reasons else [])]),
    )


def unequal(row: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Why a difference of two rows is not that of their methods alone: other data, or more steps. None where both agree
    or are not recorded.

    Stages of one name may differ by 5 % in their steps, which epochs of different lengths need; stages of only one row
    do not count.
    """
    if row.get("data") != other.get("data") and row.get("data") and other.get("data"):
        return f"'{row['label']}' and '{other['label']}' have different data"
    mine, theirs = row.get("steps") or {}, other.get("steps") or {}
    for stage in mine:
        a, b = mine[stage], theirs.get(stage, mine[stage])
        if abs(a - b) > 0.05 * max(a, b):
            return f"'{row['label']}' takes {a:,} steps of the stage '{stage}' and '{other['label']}' {b:,}"
    return None


def _named(shown: Quantity, reference: str | None) -> Quantity:
    """A multiple with the name of what it is a multiple of."""
    return (
        replace(shown, unit=f"× {reference}")
        if shown.unit == "×" and reference and "reference" in shown.meaning
        else shown
    )


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
        f" The gain over {baseline} is paired by seed, with its 95 % t interval in brackets; an interval that holds 0 "
        "may be chance."
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
