"""The game between a sampler and an adversary who decides which answers of the teacher are wrong (arXiv 2210.01213),
and draws from its solution.

All in float64 on the host. The closed form of `solve` was derived for this library and is checked against a linear
program in its tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from stillhouse.errors import UserError

Gain = Literal["margin", "entropy", "confidence"]
FLOOR = 1e-6


@dataclass(frozen=True)
class Solution:
    """A sampling distribution (n,), the gain that it guarantees whatever m answers are right, and how many points it
    may query."""

    probs: np.ndarray
    value: float
    support: int


def gains(probs: np.ndarray, kind: Gain = "margin") -> np.ndarray:
    """How much there is to learn from each point, (n,) in [0, 1], from the student's probabilities (n, C) alone.

    `margin` is 1 - (p1 - p2); `entropy` is divided by log C; `confidence` is 1 - p1.
    """
    p = np.asarray(probs, dtype=np.float64)
    if p.ndim != 2 or p.shape[1] < 2:
        raise UserError(
            f"rad: gains are computed from probabilities (n, C) of at least two classes; given shape {p.shape}."
        )
    if kind == "entropy":
        return -(p * np.log(np.maximum(p, np.finfo(np.float64).tiny))).sum(1) / np.log(p.shape[1])
    top = np.partition(p, p.shape[1] - 2, axis=1)[:, -2:]
    return 1 - top[:, 1] if kind == "confidence" else 1 - (top[:, 1] - top[:, 0])


def solve(gain: np.ndarray, correct: int, generator: np.random.Generator | None = None) -> Solution:
    """The distribution that maximises the worst-case expected gain, min over |W| = m of sum_{i in W} p_i g_i.

    With g falling, H_k = sum_{i <= k} 1 / g_i and k* = argmax_k (k - (n - m)) / H_k (the first of equals):
    p_i = 1 / (g_i H_{k*}) for i <= k*, else 0.

    Args:
        gain: (n,), not negative. Those under a millionth of the largest count as that; if all are 0 the answer is
            uniform.
        correct: m, how many of the n answers are right.
        generator: breaks ties; without it, the order given does.

    Raises:
        UserError: gains that are negative or not finite, or m outside 1 ... n.
    """
    g = checked_gains(gain)
    n = len(g)
    if not 1 <= correct <= n:
        raise UserError(f"rad: of {n} points between 1 and {n} must be answered rightly; given: {correct}.")
    if g.max() == 0:
        return Solution(np.full(n, 1 / n), 0.0, n)
    g = np.maximum(g, FLOOR * g.max())
    shuffled = np.arange(n) if generator is None else generator.permutation(n)
    order = shuffled[np.argsort(-g[shuffled], kind="stable")]
    harmonic = np.cumsum(1 / g[order])
    value = (np.arange(1, n + 1) - (n - correct)) / harmonic
    k = int(np.argmax(value)) + 1
    p = np.zeros(n)
    p[order[:k]] = 1 / (g[order[:k]] * harmonic[k - 1])
    return Solution(p / p.sum(), float(value[k - 1]), k)


def guaranteed(weights: np.ndarray, gain: np.ndarray, correct: int) -> float:
    """What sampling with these weights (probabilities or marginals, (n,)) gains in the worst case: the sum of the m
    smallest w_i g_i."""
    return float(np.sort(weights * gain)[:correct].sum())


def marginals(probs: np.ndarray, gain: np.ndarray, queries: int) -> np.ndarray:
    """Inclusion probabilities (n,) of b distinct points, sum b: min(1, c p_i). Optimal for b points where none is
    capped, else a heuristic.

    Where the support has fewer than b points, the b largest gains are certain. Raises `UserError` for b
    outside 1 ... n.
    """
    check_queries(queries, len(probs))
    if (probs > 0).sum() <= queries:
        q = np.zeros(len(probs))
        q[np.lexsort((-gain, probs <= 0))[:queries]] = 1.0
        return q
    falling = np.sort(probs)[::-1]
    rest = falling[::-1].cumsum()[::-1]  # mass of the points that are not among the first j
    scale = (queries - np.arange(queries)) / rest[:queries]
    capped = int(np.argmax(scale * falling[:queries] <= 1 + 1e-12))
    return np.minimum(1.0, scale[capped] * probs)


def exact_marginals(gain: np.ndarray, correct: int, queries: int) -> np.ndarray:
    """Inclusion probabilities (n,) that are optimal for b distinct points.

    max m t - sum s_i with s_i >= t - q_i g_i, s >= 0, 0 <= q <= 1, sum q = b.
    """
    from scipy.optimize import linprog
    from scipy.sparse import csr_array, diags_array, hstack

    g = checked_gains(gain)
    n = len(g)
    check_queries(queries, n)
    cost = np.concatenate([np.zeros(n), np.ones(n), [-correct]])  # of q, s, t
    rows = hstack([-diags_array(g), -diags_array(np.ones(n)), csr_array(np.ones((n, 1)))])
    total = np.concatenate([np.ones(n), np.zeros(n + 1)])[None]
    found = linprog(cost, rows, np.zeros(n), total, [queries], [(0, 1)] * n + [(0, None)] * n + [(None, None)])
    if found.x is None:
        raise UserError(
            f"rad: the linear program of the batch found no solution ({found.message}); use marginals: capped."
        )
    q = np.clip(found.x[:n], 0, 1)
    return q * (queries / q.sum()) if q.max() < 1 else q


def solve_relative(gain: np.ndarray, correct: int) -> Solution:
    """The distribution that maximises the worst ratio of its gain to the best gain under the same errors, by a linear
    program (a few hundred points).

    With g falling, every j that may be the largest right answer bounds the value: v <= p_j + (sum of the m - 1 smallest
    p_i g_i with i > j) / g_j.

    Raises:
        UserError: as `solve`; or a gain of 0, where the ratio is not defined.
    """
    from scipy.optimize import linprog
    from scipy.sparse import lil_array

    g = checked_gains(gain)
    n, m = len(g), correct
    if not 1 <= m <= n:
        raise UserError(f"rad: of {n} points between 1 and {n} must be answered rightly; given: {m}.")
    if g.min() <= 0:
        raise UserError("rad: the relative game needs gains above 0.")
    order = np.argsort(-g, kind="stable")
    s = g[order]
    firsts = n - m + 1  # j = 0 ... n - m leaves m - 1 points after it
    pairs = [(j, i) for j in range(firsts) for i in range(j + 1, n)] if m > 1 else []
    width = n + 1 + firsts + len(pairs)  # p, v, t_j, slack_ji
    rows, bound = lil_array((firsts + len(pairs), width)), np.zeros(firsts + len(pairs))
    for j in range(firsts):  # v - p_j - ((m - 1) t_j - sum_i slack_ji) / g_j <= 0
        rows[j, n], rows[j, j], rows[j, n + 1 + j] = 1, -1, -(m - 1) / s[j]
    for at, (j, i) in enumerate(pairs):  # slack_ji >= t_j - p_i g_i
        slack = n + 1 + firsts + at
        rows[j, slack] = 1 / s[j]
        rows[firsts + at, n + 1 + j], rows[firsts + at, i], rows[firsts + at, slack] = 1, -s[i], -1
    cost = np.zeros(width)
    cost[n] = -1
    total = np.zeros((1, width))
    total[0, :n] = 1
    free = [(None, None)] * (1 + firsts)
    found = linprog(cost, rows.tocsr(), bound, total, [1], [(0, 1)] * n + free + [(0, None)] * len(pairs))
    p = np.zeros(n)
    p[order] = np.clip(found.x[:n], 0, 1)
    return Solution(p / p.sum(), float(found.x[n]), int((p > 1e-12).sum()))


def draw(inclusion: np.ndarray, queries: int, generator: np.random.Generator) -> np.ndarray:
    """Exactly b distinct points (b,) with these inclusion probabilities (n,), sum b: systematic sampling in a random
    order."""
    certain = np.flatnonzero(inclusion >= 1 - 1e-9)
    left = queries - len(certain)
    open_ = generator.permutation(np.flatnonzero((inclusion < 1 - 1e-9) & (inclusion > 0)))
    if left <= 0 or not len(open_):
        return certain[:queries]
    ends = np.cumsum(inclusion[open_])
    ends *= left / ends[-1]
    hit = np.searchsorted(ends, generator.uniform() + np.arange(left), side="right")
    return np.concatenate([certain, open_[np.minimum(hit, len(open_) - 1)]])


def checked_gains(gain: np.ndarray) -> np.ndarray:
    """Gains (n,) in float64. Raises `UserError` where there are none, or one is negative or not finite."""
    g = np.asarray(gain, dtype=np.float64)
    if g.ndim != 1 or not len(g):
        raise UserError(f"rad: gains must be (n,) of at least one point; given shape {g.shape}.")
    wrong = np.flatnonzero(~np.isfinite(g) | (g < 0))
    if len(wrong):
        raise UserError(f"rad: gains must be finite and not negative; point {int(wrong[0])} has {g[wrong[0]]}.")
    return g


def check_queries(queries: int, points: int) -> None:
    """Raise `UserError` unless 1 <= b <= n."""
    if not 1 <= queries <= points:
        raise UserError(f"rad: {queries} points are to be queried, but the pool holds {points}; take 1 to {points}.")
