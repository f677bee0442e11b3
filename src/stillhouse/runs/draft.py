"""`draft`: a recipe to start from, for data and networks that a user names."""

from __future__ import annotations

import math
from typing import Any

import yaml

from stillhouse.config.specs import DataSpec
from stillhouse.errors import UserError
from stillhouse.evaluation.quantities import known, quantity
from stillhouse.runs import recipe as recipes

FRESH_STEPS, TUNED_STEPS = 6000, 2000
"""Optimiser steps of a network from random weights, and from published ones."""
LINES = """\
# {found}
# A draft to start from; every value may be changed. Check it: stillhouse run FILE --dry-run
# Compare its variants: stillhouse bench FILE --seeds 0,1,2
data: {data}
teacher:
  model: {teacher}{weights}
  train: {teacher_train} # once, before the students; then read from the cache
student: {student}
objectives:
  - {{name: ce, weight: 0.1}}
  - {{name: kd, weight: 0.9, temperature: 4}}
train: {train}
claims:
  - {{says: "The teacher's outputs make the student better than labels alone.", figure: {figure}, of: kd, over: alone}}
variants:
  alone: {{objectives: [ce], teacher: null}} # the baseline: the same student, without a teacher
  kd: {{}}
  smoke: {{train.epochs: 1, teacher.train.epochs: 1}} # does it run?
"""


def draft(
    data: str, teacher: str, student: str, *, pretrained: bool = True, val: float = 0.1, data_root: str | None = None
) -> str:
    """The text of a recipe: a schedule that suits the amount of data, the baseline, and the claim that decides.

    Args:
        data: a data set by name, such as imagefolder:PATH; it is read.
        teacher, student: networks by name.
        pretrained: start networks of other libraries from their published weights.
        val: share of the training samples for validation, where the data has no such split.
        data_root: folder that holds the data sets.

    Raises:
        UserError: what a recipe would refuse; data whose networks give no logits.
    """
    from stillhouse.data import load

    spec = DataSpec(name=data)
    bundle = load(spec, data_root, 0)
    if tuple(bundle.task.supervised) != ("ce",):
        raise UserError(
            f"A draft distils class scores, but data.name '{data}' is data for {bundle.task.name}; start from one of "
            "the recipes that `stillhouse recipe` lists."
        )
    count = len(bundle.dataset("train", train=False))
    batch = 8 if bundle.task.name == "segmentation" else 32 if count < 5000 else 128
    own_val = {} if bundle.has("val") else {"val": val}
    published = {name: pretrained and name.partition(":")[0] in ("timm", "torchvision") for name in (teacher, student)}
    figure = next(
        (name for name in ("accuracy", *bundle.task.groups) if name in bundle.task.groups and known(name)), "nll"
    )
    splits = ", ".join(
        f"{len(bundle.dataset(s, train=False)):,} {'training' if s == 'train' else s} samples"
        for s in ("train", "val", "test")
        if bundle.has(s)
    )
    text = LINES.format(
        found=f"{data}: {splits}. Judged by: {quantity(figure).title}.",
        data=_flow({"name": data, **own_val}),
        teacher=_flow(teacher),
        weights="\n  pretrained: true # fine-tuned on the data first" if published[teacher] else "",
        teacher_train=_flow(_schedule(count, batch, published[teacher])),
        student=_flow({"model": student, **({"pretrained": True} if published[student] else {})}),
        train=_flow(_schedule(count, batch, published[student])),
        figure=figure,
    )
    tree = yaml.safe_load(text)
    for variant in (None, *tree["variants"]):
        recipes.load(tree, variant)
    return text


def _schedule(count: int, batch: int, tuned: bool) -> dict[str, Any]:
    """AdamW with a warm-up of at most a tenth and a cosine, for about as many steps as such a network needs."""
    per_epoch = max(1, count // batch)
    epochs = min(200, 5 * math.ceil((TUNED_STEPS if tuned else FRESH_STEPS) / per_epoch / 5))
    optimizer = {"name": "adamw", "lr": 2e-4 if tuned else 1e-3, "weight_decay": 0.05}
    return {
        "epochs": epochs,
        "batch_size": min(batch, count),
        "optimizer": optimizer,
        "schedule": {"warmup_epochs": max(1, epochs // 20)},
        "clip": 5,
    }


def _flow(value: Any) -> str:
    """A value in YAML's one-line form."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).removesuffix("...\n").strip()
