"""One sentence on what a student is worth: its size, speed and quality against its teacher, and its gain over the
baseline."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from stillhouse.evaluation.quantities import in_reading_order, quantity
from stillhouse.evaluation.statistics import Difference, mean

COSTS = {"parameters": ("smaller", "larger"), "latency_ms": ("faster", "slower")}


def primary_of(figures: Collection[str]) -> str | None:
    """The figure to compare by: accuracy, or the first that there is."""
    return "accuracy" if "accuracy" in figures else next(iter(in_reading_order(set(figures))), None)


def against_teacher(student: Mapping[str, float], teacher: Mapping[str, float], primary: str) -> str:
    """Such as `4.2 times smaller and 3.0 times faster than the teacher, at 1.30 points less`; of what both have
    figures of. "" where there is nothing to compare.

    >>> against_teacher({"parameters": 10, "accuracy": 0.9}, {"parameters": 42, "accuracy": 0.913}, "accuracy")
    '4.2 times smaller than the teacher, at 1.30 points less'
    """
    phrases = [phrase for name, words in COSTS.items() if (phrase := _times(student, teacher, name, words))]
    ahead = f"{' and '.join(phrases)} than the teacher" if phrases else ""
    if primary not in student or primary not in teacher:
        return ahead
    shown = quantity(primary)
    difference = student[primary] - teacher[primary]
    size = shown.digits(abs(difference))
    amount = f"{size} {shown.difference_unit} {'more' if difference > 0 else 'less'}".replace("  ", " ")
    if float(size.replace(",", "")) == 0:
        return f"{ahead}, and as good" if ahead else "as good as the teacher"
    return f"{ahead}, at {amount}" if ahead else f"{amount} than the teacher"


def over_baseline(gain: Difference, baseline: str, primary: str) -> str:
    """Such as `+1.70 points over alone, not certain with 3 seeds`."""
    shown = quantity(primary)
    text = f"{shown.signed(gain.mean)} {shown.difference_unit} over {baseline}".replace("  ", " ")
    if math.isnan(gain.low):
        return f"{text}, which may be chance" if gain.n < 2 else text
    certain = gain.low > 0 or gain.high < 0
    return f"{text}, {'certain' if certain else 'not certain'} with {gain.n} seeds"


def means(figures: Mapping[str, list[float]]) -> dict[str, float]:
    """The mean of each figure over its seeds."""
    return {name: mean(values) for name, values in figures.items() if values}


def _times(student: Mapping[str, float], teacher: Mapping[str, float], name: str, words: tuple[str, str]) -> str:
    mine, theirs = student.get(name, 0.0), teacher.get(name, 0.0)
    if not (mine > 0 and theirs > 0):
        return ""
    ratio, word = (theirs / mine, words[0]) if theirs >= mine else (mine / theirs, words[1])
    return f"{ratio:,.0f} times {word}" if ratio >= 10 else f"{ratio:.1f} times {word}" if ratio >= 1.05 else ""
