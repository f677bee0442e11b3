"""The evaluator of synthetic sets: networks trained on the set from scratch and tested on real data, over several
initialisations.

Hard and soft labels are protocols of their own. Each network is a stage, so that an interrupted evaluation resumes, and
what is trained on real data is trained once for all methods on the same data. Besides the set's own accuracy:
DD-Ranking's scores (`ranking`), continual learning with the set as memory (`continual`), and architecture search by it
(`search`), each in a file of its own here.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from stillhouse.config.specs import ModelSpec
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.run import Run
from stillhouse.synthetic.config import EvaluateSpec
from stillhouse.synthetic.judging.continual import classes_seen, continual
from stillhouse.synthetic.judging.protocol import Judging, NetworkResult, TrainingChange, first_split
from stillhouse.synthetic.judging.ranking import ranking
from stillhouse.synthetic.judging.search import candidates, search
from stillhouse.synthetic.product import SyntheticSet


@evaluates("synthetic_set")
def judge(product: SyntheticSet, run: Run, soft: TrainingChange | None = None) -> dict[str, float]:
    """`accuracy` (mean over networks; `accuracy_std`), the same by name of each of `cross`, the set's size, and what
    else `evaluate` sets.

    `evaluate`, `network`, `augment` and `data` of the run's config say how.

    Args:
        soft: how networks learn from the product's soft labels, where that is its own affair. A product with such
            labels has a kind of its own, whose evaluator is one line: `return judge(product, run, lambda plain:
                MyTraining.like(plain, run.config.student))`.

    Raises:
        UserError: data without a test split, or a product without the labels that the protocol needs.
    """
    judging = Judging(product, run, soft)
    spec = judging.spec
    best, own = spec.best_every is not None, judging.own(judging.augment)
    out = _figures("accuracy", judging.networks(judging.stage, own), best)
    for name, model in zip(_names(spec.cross), spec.cross):
        out |= _figures(
            f"accuracy_{name}", judging.networks(judging.stage, own, model=model, count=spec.cross_networks), best
        )
    if spec.scores:
        out |= ranking(judging)
    if spec.continual is not None:
        out |= continual(judging, spec.continual)
    if spec.search is not None:
        out |= search(judging, spec.search)
    pixels = product.pixels()
    return out | {
        "stored_images": float(len(product)),
        "stored_mb": product.bytes / 1e6,
        "out_of_range_pixels": float(((pixels < -1e-3) | (pixels > 1 + 1e-3)).double().mean()),
    }


def planned(run: Run, config: Any) -> str:
    """What judging a set of this recipe will do, in words. Trains nothing.

    Raises:
        UserError: what would be found amiss only when the set is made: data without a test split, a network that cannot
            be built, more steps than classes.
    """
    spec: EvaluateSpec = config.evaluate
    does = [f"train {spec.networks} networks on the set and test them ({spec.protocol} labels)"]
    models = [spec.network or config.network, *spec.cross]
    first_split(run, config.data, "test", "val", "holdout")
    if spec.cross:
        does.append(f"and {spec.cross_networks} of each of {len(spec.cross)} other architectures")
    if spec.scores:
        does.append("and others on real images, for its scores")
    if spec.continual is not None:
        does.append(
            f"continual learning in {len(classes_seen(spec.continual, run.data(config.data).num_classes, run.seed))} "
            "steps"
        )
    if spec.search is not None:
        models += candidates(spec.search)
        does.append(f"search among {len(candidates(spec.search))} architectures")
    for model in models:
        run.model(model, config.data, role="judge")
    return "; ".join(does)


def _figures(name: str, found: Sequence[NetworkResult], best: bool) -> dict[str, float]:
    """Mean and spread of accuracies, and, where `best_every` is set, those of the best epochs."""
    values = {name: [t.accuracy for t in found]} | ({f"{name}_best": [t.best for t in found]} if best else {})
    return {
        k: v
        for n, given in values.items()
        for k, v in ((n, statistics.fmean(given)), (f"{n}_std", statistics.pstdev(given)))
    }


def _names(models: Sequence[ModelSpec]) -> list[str]:
    """Short names of models; those that several share are numbered."""
    plain = [m.model.rpartition(":")[2] for m in models]
    seen: Counter[str] = Counter()
    out = []
    for name in plain:
        seen[name] += 1
        out.append(name if plain.count(name) == 1 else f"{name}_{seen[name]}")
    return out
