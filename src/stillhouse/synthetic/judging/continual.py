"""Continual learning with a synthetic set as memory, as DM (arXiv 2110.04181) and DataDAM (arXiv 2310.00093) show it,
after GDumb (ECCV 2020).

Classes arrive in steps, in an order that the run's seed draws. After each step the memory holds the stored images of
all classes so far; a network with an output for each of them is trained on it from scratch and tested on all of them. A
method whose loss is a sum over classes (DM, DataDAM) makes the same images whether it sees the classes one after
another or, as here, at once; for others this is the memory that hindsight would have made.
"""

from __future__ import annotations

import statistics

from stillhouse.errors import UserError
from stillhouse.randomness import permutation
from stillhouse.synthetic.config import ContinualSpec
from stillhouse.synthetic.judging.protocol import Judging


def continual(judging: Judging, spec: ContinualSpec) -> dict[str, float]:
    """`continual_step1` …: the accuracy over all classes seen after each step, mean over networks; and their mean,
    `continual_accuracy`."""
    found = []
    for step, seen in enumerate(classes_seen(spec, judging.num_classes, judging.run.seed), 1):
        trained = judging.networks(
            f"evaluate.continual.{step}", judging.hard_labels(judging.augment, seen), classes=seen
        )
        found.append(statistics.fmean(t.accuracy for t in trained))
    return {"continual_accuracy": statistics.fmean(found), **{f"continual_step{i}": a for i, a in enumerate(found, 1)}}


def classes_seen(spec: ContinualSpec, classes: int, seed: int) -> list[list[int]]:
    """The classes seen after each step, in the order they came. Raises `UserError` for more steps than classes."""
    if spec.steps > classes:
        raise UserError(
            f"evaluate.continual.steps is {spec.steps}, but there are {classes} classes; take at most {classes}."
        )
    order = permutation(classes, seed, "class order")
    return [order[: classes * step // spec.steps] for step in range(1, spec.steps + 1)]
