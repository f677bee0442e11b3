"""Rules that choose at which pool points the teacher is queried: RAD's, and those it is compared with, behind one
interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stillhouse.methods.classification.rad.game import Gain, draw, exact_marginals, gains, marginals, solve

CANDIDATES = 10  # cluster_margin looks at so many times as many points as it takes


@dataclass(frozen=True)
class Pool:
    """What a rule may see: the student's view of the n unanswered points, and how many answers are expected to be
    right. No answer, no label.

    Attributes:
        probs: (n, C) of the student.
        embedding: (n, D) of the student.
        known: (k, D) embeddings of the points that have a label or an answer already.
        correct: how many of the n points the teacher would answer rightly.
    """

    probs: np.ndarray
    embedding: np.ndarray
    known: np.ndarray
    correct: int


@dataclass(frozen=True)
class Queries:
    """The points to query, (b,), each mixed with `share` (b,) of its `partner` (b,); a share of 0 is the point
    itself."""

    points: np.ndarray
    partners: np.ndarray
    share: np.ndarray

    @classmethod
    def of(cls, points: np.ndarray) -> Queries:
        return cls(points, points, np.zeros(len(points)))


def rad(pool: Pool, queries: int, generator: np.random.Generator, kind: Gain, exact: bool) -> Queries:
    """Robust active distillation: the worst-case optimal distribution, its marginals, a systematic draw."""
    gain = gains(pool.probs, kind)
    if exact:
        return Queries.of(draw(exact_marginals(gain, pool.correct, queries), queries, generator))
    return Queries.of(draw(marginals(solve(gain, pool.correct, generator).probs, gain, queries), queries, generator))


def uniform(pool: Pool, queries: int, generator: np.random.Generator, kind: Gain, exact: bool) -> Queries:
    return Queries.of(generator.permutation(len(pool.probs))[:queries])


def margin(pool: Pool, queries: int, generator: np.random.Generator, kind: Gain, exact: bool) -> Queries:
    return Queries.of(_largest(gains(pool.probs, "margin"), queries, generator))


def entropy(pool: Pool, queries: int, generator: np.random.Generator, kind: Gain, exact: bool) -> Queries:
    return Queries.of(_largest(gains(pool.probs, "entropy"), queries, generator))


def coreset(pool: Pool, queries: int, generator: np.random.Generator, kind: Gain, exact: bool) -> Queries:
    """Greedy k-centre in the student's embedding: each point is the one farthest from all that is known (Sener and
    Savarese, arXiv 1708.00489)."""
    x = pool.embedding.astype(np.float64)
    distance = np.full(len(x), np.inf)
    for block in np.array_split(pool.known, max(1, len(pool.known) // 256)):
        distance = np.minimum(distance, _squared(x, block.astype(np.float64)).min(1))
    points = []
    for _ in range(queries):
        points.append(int(distance.argmax()))
        distance = np.minimum(distance, _squared(x, x[points[-1] :][:1])[:, 0])
        distance[points[-1]] = -1
    return Queries.of(np.array(points))


def cluster_margin(pool: Pool, queries: int, generator: np.random.Generator, kind: Gain, exact: bool) -> Queries:
    """The points of smallest margin, taken in turn from clusters of the embedding, small clusters first (Citovsky et
    al., arXiv 2107.14263)."""
    from sklearn.cluster import AgglomerativeClustering

    candidates = _largest(gains(pool.probs, "margin"), min(CANDIDATES * queries, len(pool.probs)), generator)
    cluster = AgglomerativeClustering(min(queries, len(candidates)), linkage="average").fit_predict(
        pool.embedding[candidates]
    )
    turn = np.zeros(len(candidates), dtype=np.int64)  # the how-manieth of its cluster
    for c in range(cluster.max() + 1):
        turn[cluster == c] = np.arange((cluster == c).sum())
    size = np.bincount(cluster)[cluster]
    return Queries.of(candidates[np.lexsort((cluster, size, turn))[:queries]])


def unixkd(pool: Pool, queries: int, generator: np.random.Generator, kind: Gain, exact: bool) -> Queries:
    """The points of largest entropy, each mixed with up to half of a random other point, the less certain the less of
    it (after arXiv 2012.09413)."""
    gain = gains(pool.probs, "entropy")
    points = _largest(gain, queries, generator)
    share = 0.5 * (1 - gain[points]) * generator.uniform(size=len(points))
    return Queries(points, generator.integers(len(gain), size=len(points)), share)


RULES: dict[str, Callable[[Pool, int, np.random.Generator, Gain, bool], Queries]] = {
    f.__name__: f for f in (rad, uniform, margin, entropy, coreset, cluster_margin, unixkd)
}


def _largest(gain: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """The points of the largest gains, ties in random order."""
    shuffled = generator.permutation(len(gain))
    return shuffled[np.argsort(-gain[shuffled], kind="stable")[:count]]


def _squared(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(n, D) and (k, D) -> (n, k) squared distances."""
    return np.maximum((x**2).sum(1)[:, None] - 2 * x @ y.T + (y**2).sum(1), 0)
