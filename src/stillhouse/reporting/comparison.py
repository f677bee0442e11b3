"""A comparison of methods over seeds, from the JSON of a bench: as an HTML report, a table for the terminal, and
Markdown.

All three show the same rows (`rows.compare`): mean ± sample standard deviation, and the gain over the baseline with a
95 % t interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.evaluation.quantities import Quantity
from stillhouse.evaluation.statistics import mean, mean_interval
from stillhouse.reporting.headline import against_teacher, means, over_baseline
from stillhouse.reporting.page import cards, code, figure, folded, grid, legend, page, pairs, section, table, write
from stillhouse.reporting.rows import Comparison, compare
from stillhouse.reporting.verdicts import Verdict, counted, verdict_table

if TYPE_CHECKING:
    import rich.table


IN_TERMINAL = {
    "ece": "ECE",
    "step_relative": "Step",
    "step_memory_relative": "Step mem.",
    "parameters": "Params",
    "multiply_adds": "MACs",
    "latency_ms": "Latency",
    "file_bytes": "File",
}
"""The figures that a terminal has room for besides the primary one and the gain, by short titles; MACs are
multiply-adds."""


def comparison_table(results: Mapping[str, Any]) -> rich.table.Table:
    """The comparison for a terminal of 80 columns: the primary figure, the gain, calibration and cost (means alone),
    with the note as the caption."""
    import rich.box
    import rich.table
    from rich.text import Text

    comparison = compare(results)
    first = 2 + (comparison.baseline is not None) + bool(comparison.groups)  # method, group, primary figure, gain
    names = [""] * first + [n for n in comparison.shown if n != comparison.primary]
    headers = [
        h.replace(" (", "\n(") if i < first else f"{IN_TERMINAL.get(names[i], '')}\n({comparison.shown[names[i]].unit})"
        for i, h in enumerate(comparison.headers())
    ]
    room = list(IN_TERMINAL)[: 3 if "step_relative" in names else None]
    keep = [i for i, name in enumerate(names) if i < first or name in room]
    title, caption = Text(comparison.title), Text(comparison.note)
    out = rich.table.Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for i in keep:
        out.add_column(
            Text(headers[i].removesuffix("\n()")),
            justify="right" if i else "left",
            no_wrap=i > 0,
            overflow="fold",
            min_width=8 if i == 0 else None,
        )
    for row in comparison.cells():
        shown = [c.text for c in row]
        if comparison.baseline is not None:
            shown[first - 1] = shown[first - 1].replace(" [", "\n[")
        out.add_row(*(Text(shown[i] if i < first else shown[i].partition(" ± ")[0]) for i in keep))
    return out


def comparison_markdown(results: Mapping[str, Any]) -> str:
    """The comparison as a Markdown table, with the note under it."""
    comparison = compare(results)
    headers = comparison.headers()
    lines = [
        headers,
        ["---", *["---:"] * (len(headers) - 1)],
        *([c.text for c in cells] for cells in comparison.cells()),
    ]
    body = "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)
    return f"{body}\n\n{comparison.note}\n"


def write_comparison_report(results: Mapping[str, Any], path: Path) -> Path:
    """Write the comparison as one HTML file that needs no network. Returns its path; raises as `compare`."""
    comparison = compare(results)
    shown = comparison.shown[comparison.primary]
    labels = [row.label for row in comparison.rows]
    marked = [i for i, label in enumerate(labels) if label == comparison.baseline]
    parts = [(f" · {g}", comparison.only(g)) for g in comparison.groups] or [("", comparison)]
    meaning = f"{shown.title}: {shown.meaning or 'the figure that the methods are compared by.'}"
    body = [
        *(section(f"At a glance{name}", headline(part) + meaning, cards(_glance(part, shown))) for name, part in parts),
        section(
            "All figures",
            f"{comparison.note} Click on a header to sort.",
            table(comparison.headers(), comparison.cells(), marked),
            _glossary(comparison),
        ),
        *_claims(results),
        *(block for name, part in parts for block in _plots(part, shown, name)),
        *_origin(results),
    ]
    about = [str(results[k]) for k in ("slug", "created", "device") if results.get(k)]
    return write(path, page(comparison.title, " · ".join(about), body))


def headline(comparison: Comparison) -> str:
    """A sentence on the first row that is not the baseline, against teacher and baseline; "" where there is none."""
    row = next((r for r in comparison.rows if r.label != comparison.baseline and r.values(comparison.primary)), None)
    if row is None:
        return ""
    teacher = comparison.teacher
    parts = [against_teacher(means(row.figures), means(teacher.figures), comparison.primary)] if teacher else []
    if row.gain is not None and comparison.baseline is not None:
        parts.append(over_baseline(row.gain, comparison.baseline, comparison.primary))
    notes = "; ".join(filter(None, parts))
    return f"{row.label}: {notes}. " if notes else ""


def _glance(comparison: Comparison, shown: Quantity) -> list[tuple[str, str, str]]:
    """Cards: the teacher, the baseline, and each other method, best first (at most four)."""
    out = []
    if comparison.teacher and (values := comparison.teacher.values(comparison.primary)):
        out.append((comparison.teacher.label, shown.text(mean(values)), "The teacher: what the students learn from."))
    scored = [row for row in comparison.rows if row.values(comparison.primary)]
    out += [
        (
            row.label,
            shown.text(mean(row.values(comparison.primary))),
            "The baseline: what the others are measured against.",
        )
        for row in scored
        if row.label == comparison.baseline
    ]
    others = sorted(
        (row for row in scored if row.label != comparison.baseline),
        key=lambda row: mean(row.values(comparison.primary)),
        reverse=shown.better >= 0,
    )
    for row in others[:4]:
        why = ""
        if row.gain is not None:
            why = f"{shown.signed(row.gain.mean)} {shown.difference_unit}".strip() + f" over {comparison.baseline}"
            why += (
                "."
                if math.isnan(row.gain.low)
                else "; the interval "
                f"{'holds 0: may be chance' if row.gain.low <= 0 <= row.gain.high else 'does not hold 0'}."
            )
        out.append((row.label, shown.text(mean(row.values(comparison.primary))), why))
    return out


def _glossary(comparison: Comparison) -> str:
    meanings = {q.header: q.meaning for q in comparison.shown.values() if q.meaning}
    return folded("What the columns mean", pairs(meanings)) if meanings else ""


def _plots(comparison: Comparison, shown: Quantity, suffix: str = "") -> list[str]:
    from stillhouse.reporting.figures import TEACHER, Spread, dots, styles, trade

    anchor = suffix.replace(" · ", "-").replace(" ", "-")
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
        text = (
            f"{comparison.shown[name].title} of each method: every seed (ring), the mean (filled) and its 95 % t "
            "interval (bar)" + ("; dashed: the teacher." if line else ".")
        )
        return figure(dots(spreads(name), comparison.shown[name], style, line), f"dots-{name}{anchor}", text)

    out = [
        section(
            f"{shown.title}, seed by seed{suffix}",
            "Methods whose points overlap can hardly be distinguished; those with separate points can.",
            dot_plot(comparison.primary),
        )
    ]
    quality = spreads(comparison.primary)
    costs = []
    for name in (n for n in ("parameters", "multiply_adds", "step_relative", "train_seconds") if n in comparison.shown):
        cost = comparison.shown[name]
        points = {
            row.label: (mean(row.values(name)), quality[row.label])
            for row in comparison.rows
            if row.values(name) and row.label in quality
        }
        star = (teacher.label, of_teacher(name), of_teacher(comparison.primary)) if teacher else None
        if star and math.isnan(star[1] + star[2]):
            star = None
        if len({value for value, _ in points.values()} | ({star[1]} if star else set())) > 1:
            text = f"{shown.title} against {cost.title.lower()}. {cost.meaning}"
            costs.append(figure(trade(points, cost, shown, style, star), f"cost-{name}{anchor}", text))
    if costs:
        marks = [(look.mark, look.color, label) for label, look in style.items()]
        if teacher:
            marks.append((TEACHER.mark, TEACHER.color, teacher.label))
        text = "The best place is the upper left: good at a low price. Bars are 95 % t intervals of the mean."
        out.append(section(f"Quality against cost{suffix}", text, legend(marks), grid(costs)))
    if "ece" in comparison.shown and comparison.primary != "ece":
        out.append(section(f"Calibration{suffix}", comparison.shown["ece"].meaning, dot_plot("ece")))
    return out


def _claims(results: Mapping[str, Any]) -> list[str]:
    """The verdicts of the recipes' claims."""
    found = [
        (Path(str(record.get("recipe", ""))).stem, Verdict.from_record(record))
        for record in results.get("claims") or ()
    ]
    text = (
        "What the papers say, and whether these figures show it. A difference is positive where the first row is "
        "better."
    )
    return [section(f"Claims: {counted(v for _, v in found)}", text, verdict_table(found))] if found else []


def _origin(results: Mapping[str, Any]) -> list[str]:
    """How to make this comparison again."""
    content = code(results["command"]) if results.get("command") else ""
    recipes = {
        row["label"]: " · ".join(str(row[k]) for k in ("recipe", "variant") if row.get(k)) for row in results["rows"]
    }
    for title, items in (
        ("Recipes", {k: v for k, v in recipes.items() if v}),
        ("Versions", results.get("versions") or {}),
    ):
        if items:
            content += f"<h3>{title}</h3>{pairs(items)}"
    return (
        [
            section(
                "How it was made",
                "The command, the recipes (with their variants) and the versions that gave these figures.",
                content,
            )
        ]
        if content
        else []
    )
