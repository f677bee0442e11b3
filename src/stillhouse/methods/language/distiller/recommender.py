"""AutoDistiller: from facts of a data set and of a pipeline to how much of the teacher's score a student will keep
(Distiller, section 3.4). The regressor is ours [R]: gradient-boosted trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stillhouse.errors import UserError

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """A pipeline tried on a data set: `ratio` is the student's score over the teacher's."""

    data: str
    features: Facts
    pipeline: Facts
    ratio: float


class Recommender:
    """Predicts ratios from trials.

    Args:
        trials: at least two, of any data sets but the one that is asked for.
        seed: of the trees.
    """

    def __init__(self, trials: Sequence[Trial], seed: int = 0) -> None:
        from sklearn.ensemble import GradientBoostingRegressor

        if len(trials) < 2:
            raise UserError(f"A recommender learns from at least two trials; given: {len(trials)}.")
        self.known = {t.data for t in trials}
        self._columns = columns([{**t.features, **t.pipeline} for t in trials])
        self._trees = GradientBoostingRegressor(random_state=seed, n_estimators=100, max_depth=3)
        self._trees.fit(self._matrix([(t.features, t.pipeline) for t in trials]), [t.ratio for t in trials])

    def _matrix(self, rows: Sequence[tuple[Facts, Facts]]) -> np.ndarray:
        return np.array([[column.value({**f, **p}) for column in self._columns] for f, p in rows])

    def predicted(self, features: Facts, pipelines: Sequence[Facts]) -> list[float]:
        """The ratio of each pipeline on a data set of these features."""
        found: list[float] = self._trees.predict(self._matrix([(features, p) for p in pipelines])).tolist()
        return found

    def best(self, data: str, features: Facts, pipelines: Sequence[Facts], count: int) -> list[int]:
        """Indices of the most promising pipelines, the best first.

        Raises:
            UserError: a data set whose own scores were learned from: that would be no prediction.
        """
        if data in self.known:
            raise UserError(
                f"The recommender has learned from trials on '{data}' itself; leave them out, or ask for another data "
                "set."
            )
        found = self.predicted(features, pipelines)
        return sorted(range(len(found)), key=lambda i: (-found[i], i))[:count]


@dataclass(frozen=True)
class Column:
    """One number of a row: a fact, or whether a fact is this word."""

    name: str
    word: str | None = None

    def value(self, row: Facts) -> float:
        found = row.get(self.name)
        if self.word is not None:
            return float(str(found) == self.word)
        return float(found) if isinstance(found, int | float) else -1.0


def columns(rows: Sequence[Facts]) -> list[Column]:
    """Numbers as they are, words as one column each, a missing fact as -1."""
    out = []
    for name in sorted({name for row in rows for name in row}):
        values = [row.get(name) for row in rows]
        if all(isinstance(v, int | float) or v is None for v in values):
            out.append(Column(name))
        else:
            out += [Column(name, word) for word in sorted({str(v) for v in values})]
    return out


def leave_one_out(trials: Sequence[Trial], top: int, seed: int = 0) -> dict[str, float]:
    """What the recommendations are worth on data sets that the recommender has not seen.

    Returns:
        `recommended_gain`: the mean ratio of the `top` recommended pipelines above that of all, mean over the data
        sets; `recommended_wins`: the share of data sets where it is higher; `recommended_regret`: how far the best of
        them is below the best of all.

    Raises:
        UserError: trials of fewer than two data sets.
    """
    names = sorted({t.data for t in trials})
    if len(names) < 2:
        raise UserError("Leaving a data set out needs trials of at least two; name more in auto.data.")
    gains, regrets = [], []
    for name in names:
        own = [t for t in trials if t.data == name]
        recommender = Recommender([t for t in trials if t.data != name], seed)
        chosen = recommender.best(name, own[0].features, [t.pipeline for t in own], top)
        ratios = [t.ratio for t in own]
        picked = [ratios[i] for i in chosen]
        gains.append(float(np.mean(picked) - np.mean(ratios)))
        regrets.append(max(ratios) - max(picked))
    return {
        "recommended_gain": float(np.mean(gains)),
        "recommended_wins": float(np.mean([g > 0 for g in gains])),
        "recommended_regret": float(np.mean(regrets)),
    }


def importance(trials: Sequence[Trial], repeats: int = 20, seed: int = 0) -> dict[str, float]:
    """How much worse the recommender explains the trials when one fact is shuffled among them: the rise of the mean
    squared error, over the variance of the ratios."""
    recommender, draw = Recommender(trials, seed), np.random.default_rng(seed)
    ratios = np.array([t.ratio for t in trials])
    spread = max(float(ratios.var()), 1e-12)

    def error(rows: Sequence[tuple[Facts, Facts]]) -> float:
        return float(((recommender._trees.predict(recommender._matrix(rows)) - ratios) ** 2).mean())

    plain = error([(t.features, t.pipeline) for t in trials])
    out = {}
    for name in sorted({n for t in trials for n in t.pipeline}):
        rises = []
        for _ in range(repeats):
            order = draw.permutation(len(trials))
            rows = [(t.features, {**t.pipeline, name: trials[j].pipeline.get(name)}) for t, j in zip(trials, order)]
            rises.append(error(rows) - plain)
        out[name] = float(np.mean(rises)) / spread
    return out
