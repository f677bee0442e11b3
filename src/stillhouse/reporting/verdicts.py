"""Verdicts on claims as a reader sees them: what was expected, what was measured, and why, in words; and a page of
many that can be sorted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from stillhouse.evaluation.quantities import quantity
from stillhouse.reporting.page import Cell, cards, page, section, table, write

SHOWN, NOT_SHOWN, CONTRADICTED, NOT_MEASURED = "shown", "not shown", "contradicted", "not measured"
MEANING = {
    SHOWN: "The 95 % interval lies above what the claim asks for.",
    NOT_SHOWN: "The interval holds values on both sides, so it may be chance; or there is no interval.",
    CONTRADICTED: "The interval lies on the wrong side.",
    NOT_MEASURED: "There are no results for it.",
}
"""Every verdict, and when it is given."""


@dataclass(frozen=True)
class Verdict:
    """A claim with what was measured. Amounts are in the figure's unit; a difference is positive where `of` is better
    than `over`.

    Attributes:
        mean, low, high: the difference, or of a bound the figure itself, with its 95 % interval, or None.
        seeds: how many there are of each row.
        note: why there is no interval, or no result.
        evidence: the file in which the rows are, without its ending.
    """

    says: str
    figure: str
    of: str
    verdict: str
    over: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    by: float = 0.0
    within: float | None = None
    group: str | None = None
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: int = 0
    because: str | None = None
    paper: str | None = None
    note: str | None = None
    evidence: str | None = None

    def record(self) -> dict[str, Any]:
        """As JSON data, without what is not there."""
        return {k: v for k, v in asdict(self).items() if v is not None and (k, v) not in (("by", 0), ("seeds", 0))}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Verdict:
        """The inverse of `record`; keys of a later version are left out."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in record.items() if k in known})

    @property
    def expected(self) -> str:
        """What the claim asks for."""
        shown = quantity(self.figure)
        amount = lambda x, unit: f"{_number(x)} {unit.removesuffix('s') if x == 1 else unit}".strip()  # noqa: E731
        if self.over is None:
            words, bound = ("at least", self.at_least) if self.at_least is not None else ("at most", self.at_most)
            return f"{shown.title} of {self.of}: {words} {amount(bound, shown.unit)}"
        if self.within is not None:
            allowed = amount(self.within, shown.difference_unit)
            return f"{shown.title}: {self.of} no more than {allowed} worse than {self.over}"
        by = f" by more than {amount(self.by, shown.difference_unit)}" if self.by else ""
        return f"{shown.title}: {self.of} better than {self.over}{by}"

    @property
    def measured(self) -> str:
        """What was measured: mean, interval, number of seeds."""
        if self.mean is None:
            return "–"
        shown = quantity(self.figure)
        unit = shown.unit if self.over is None else shown.difference_unit
        text = shown.digits if self.over is None else shown.signed
        value = lambda x: text(x / shown.scale)  # noqa: E731
        interval = "" if self.low is None or self.high is None else f" [{value(self.low)}, {value(self.high)}]"
        return f"{value(self.mean)}{interval}{' ' + unit if unit else ''}, {self.seeds} seed{'s' * (self.seeds != 1)}"

    @property
    def why(self) -> str:
        """The recipe's sentence, and why there is no interval."""
        return " ".join(text if text.endswith(".") else f"{text}." for text in (self.note, self.because) if text)


def _number(value: float | None) -> str:
    """A bound as a person writes it.

    >>> _number(0.5), _number(90.0)
    ('0.5', '90')
    """
    return "–" if value is None else f"{value:g}".replace("-", "−")


def counted(verdicts: Iterable[Verdict]) -> str:
    """`12 shown, 3 not shown, 1 contradicted`, in the order of MEANING."""
    counts = Counter(v.verdict for v in verdicts)
    return ", ".join(f"{counts[word]} {word}" for word in MEANING if counts[word]) or "no claims"


def verdict_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """A claim in two or three lines, for a terminal."""
    out = []
    for v in verdicts:
        group = f" ({v.group})" if v.group else ""
        out += [f"{v.verdict:<13} {v.says}{group}", f"{'':<13} expected: {v.expected}; measured: {v.measured}"]
        out += [f"{'':<13} {v.why}"] if v.why else []
    return out


def verdict_table(verdicts: Sequence[tuple[str, Verdict]]) -> str:
    """The sortable HTML table of verdicts, each with the name of its paper or recipe."""
    order = list(MEANING)
    rows = [
        [
            Cell(name),
            Cell(v.says),
            Cell(v.expected),
            Cell(v.measured, math.nan if v.mean is None else v.mean),
            Cell(v.verdict, float(order.index(v.verdict))),
            Cell(v.why),
        ]
        for name, v in verdicts
    ]
    return table(("Paper", "Claim", "Expected", "Measured", "Verdict", "Why"), rows)


def write_claims_page(verdicts: Sequence[tuple[str, Verdict]], path: Path) -> Path:
    """Write all verdicts as one HTML page that needs no network. Returns its path."""
    counts = Counter(v.verdict for _, v in verdicts)
    glance = cards((word, str(counts[word]), text) for word, text in MEANING.items())
    body = [
        section("At a glance", "How many claims of the papers were shown.", glance),
        section(
            "Claims",
            "Differences are positive where the first row is better. Click on a header to sort.",
            verdict_table(verdicts),
        ),
    ]
    return write(path, page("Claims and evidence", counted(v for _, v in verdicts), body))


def better(figure: str, direction: str | None = None) -> int:
    """Which way a figure is better: 1 up, -1 down, 0 not known."""
    return {"higher": 1, "lower": -1}.get(direction or "", quantity(figure).better)
