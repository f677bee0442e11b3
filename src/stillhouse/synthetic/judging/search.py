"""Architecture search with a synthetic set in place of the data, as DC, DM (arXiv 2110.04181) and DataDAM (arXiv
2310.00093) show it.

Every network of a grid is trained on the set (its proxy) and on all real data. Figures say how well the proxies'
ranking agrees with the true one, how good the architecture is that the proxies choose, and what either search costs.
Proxies choose by the validation split where the data has one. Trainings on all data have seeds of their own, so that
all methods and seeds share them; each training is a stage.
"""

from __future__ import annotations

import itertools
import statistics
from typing import Any

from stillhouse.config.specs import ModelSpec
from stillhouse.evaluation.statistics import rank_correlation
from stillhouse.synthetic.config import SearchSpec
from stillhouse.synthetic.judging.protocol import Judging, first_split

FULL_SEED = 0
"""Of the networks on all real data."""


def search(judging: Judging, spec: SearchSpec) -> dict[str, float]:
    """Figures of the search; the table of candidates goes to the run's record.

    `search_spearman`: the rank correlation of all candidates, `search_spearman_top` of the best. `search_accuracy`:
    test accuracy, trained on all data, of the architecture that the proxies choose; `search_best`: of the best one,
    which a search on all data would find; `search_mean`: of all, which a choice at random gives. `search_seconds` and
    `search_full_seconds`: of training all proxies, and all candidates on all data. `search_candidates`: how many.
    """
    models = candidates(spec)
    split = first_split(judging.run, judging.config.data, "val", "holdout", "test")
    own, whole = judging.own(judging.augment), judging.all_real()
    proxies = [judging.networks("evaluate.proxy", own, model=m, count=spec.networks, split=split) for m in models]
    full = [judging.networks("evaluate.full", whole, judging.data, model=m, seeds=[FULL_SEED])[0] for m in models]
    proxy, true = [statistics.fmean(t.accuracy for t in found) for found in proxies], [t.accuracy for t in full]
    chosen = max(range(len(models)), key=proxy.__getitem__)
    judging.run.record["search"] = [{**m.options, "proxy": p, "full": t} for m, p, t in zip(models, proxy, true)]
    judging.run.record["search_choice"] = models[chosen].options
    leading = sorted(range(len(models)), key=lambda i: -true[i])[: max(2, round(spec.top * len(models)))]
    return {
        "search_spearman": rank_correlation(proxy, true),
        "search_spearman_top": rank_correlation([proxy[i] for i in leading], [true[i] for i in leading]),
        "search_accuracy": true[chosen],
        "search_best": max(true),
        "search_mean": statistics.fmean(true),
        "search_seconds": sum(t.seconds for found in proxies for t in found),
        "search_full_seconds": sum(t.seconds for t in full),
        "search_candidates": float(len(models)),
    }


def candidates(spec: SearchSpec) -> list[ModelSpec]:
    """All combinations of the grid's values, the last option varying fastest.

    >>> [m.options for m in candidates(SearchSpec(grid={"width": [8, 16], "depth": [1]}))]
    [{'width': 8, 'depth': 1}, {'width': 16, 'depth': 1}]
    """
    combinations: list[tuple[Any, ...]] = list(itertools.product(*spec.grid.values()))
    return [ModelSpec(model=spec.model, options=dict(zip(spec.grid, values))) for values in combinations]
