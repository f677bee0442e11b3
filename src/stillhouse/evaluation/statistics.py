"""Figures over seeds: mean, spread, and the paired difference from a baseline with a t confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.errors import UserError


@dataclass(frozen=True)
class Difference:
    """A mean difference from a baseline over n seeds, and its confidence interval (NaN where n is 1)."""

    mean: float
    low: float
    high: float
    n: int


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return math.fsum(values) / len(values) if values else math.nan


def standard_deviation(values: Sequence[float]) -> float:
    """The sample standard deviation (n - 1 in the denominator); NaN for fewer than two values.

    >>> standard_deviation([1.0, 2.0, 3.0])
    1.0
    """
    if len(values) < 2:
        return math.nan
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Student's t confidence interval of the mean; NaN for fewer than two values."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return math.nan, math.nan
    half = float(t.ppf((1 + confidence) / 2, n - 1)) * standard_deviation(values) / math.sqrt(n)
    return mean(values) - half, mean(values) + half


def paired_difference(values: Sequence[float], baseline: Sequence[float], confidence: float = 0.95) -> Difference:
    """Mean of values - baseline, pair by pair, with its t confidence interval: `values[i]` and `baseline[i]` come from
    the same seed.

    Pairing takes out what a seed does to both (its split, its initialisation), so the interval is narrower than that of
    two separate means.

    Raises:
        UserError: where the two have not the same, non-zero number of values.
    """
    if len(values) != len(baseline) or not values:
        raise UserError(
            f"A paired difference needs a value of each side for every seed; got {len(values)} values and "
            f"{len(baseline)} of the baseline."
        )
    differences = [v - b for v, b in zip(values, baseline)]
    low, high = mean_interval(differences, confidence)
    return Difference(mean(differences), low, high, len(differences))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation, in [-1, 1]; 0 where all of one side are equal, which is no order.

    >>> rank_correlation([0.1, 0.2, 0.3], [1.0, 2.0, 30.0])
    1.0
    """
    from scipy.stats import spearmanr

    if len(set(a)) == 1 or len(set(b)) == 1:
        return 0.0
    return float(spearmanr(a, b).statistic)
