"""Long-tailed training data, and figures by how often a class was seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.config.specs import DataSpec
from stillhouse.data import DataBundle, load
from stillhouse.data.split import long_tailed
from stillhouse.errors import UserError
from stillhouse.evaluation.classification import ClassificationMeter
from stillhouse.signals import Signals
from stillhouse.tasks.classification import Classification


def digits(**keys) -> DataBundle:
    bundle = load(DataSpec(name="digits", **keys))
    assert isinstance(bundle, DataBundle)
    return bundle


def test_classes_keep_the_samples_of_cifar_lt():
    labels = np.repeat(np.arange(10), 5000)
    kept = np.bincount(labels[long_tailed(labels, 0.01, 0)])
    assert kept.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    shorter, longer = (set(long_tailed(labels, mu, 3).tolist()) for mu in (0.1, 0.01))
    assert longer < shorter and set(long_tailed(labels, 0.01, 4).tolist()) != longer


def test_only_training_is_thinned_and_the_task_knows_the_counts():
    bundle, whole = digits(size=1000, long_tail=0.05, holdout=0.1), digits(size=1000, holdout=0.1)
    train, out = (bundle.dataset(s, train=False).labels() for s in ("train", "holdout"))
    together = torch.bincount(torch.cat([train, out]))
    assert together.tolist() == [int(100 * 0.05 ** (c / 9) + 1e-9) for c in range(10)]
    assert isinstance(bundle.task, Classification) and bundle.task.train_counts == tuple(torch.bincount(train).tolist())
    assert torch.equal(*(b.dataset("test", train=False).labels() for b in (bundle, whole)))
    assert bundle.fingerprint != whole.fingerprint and whole.task.groups == ("accuracy", "calibration")


def test_accuracy_by_frequency_weighs_back_to_the_accuracy(tmp_path: Path):
    task = Classification(("a", "b", "c", "d"), (4,), train_counts=(101, 100, 20, 19))
    assert task.groups[-1] == "frequency" and Classification.restored(task.facts(tmp_path), tmp_path) == task
    meter = task.meter(task.groups)
    label = torch.arange(40) % 4
    logits = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    meter.add({"label": label}, Signals(logits=logits))
    figures = meter.figures()
    right = logits.argmax(-1) == label
    assert figures["accuracy_many"] == pytest.approx(right[label == 0].float().mean().item())
    assert figures["accuracy_medium"] == pytest.approx(right[(label == 1) | (label == 2)].float().mean().item())
    parts = figures["accuracy_many"] + 2 * figures["accuracy_medium"] + figures["accuracy_few"]
    assert parts / 4 == pytest.approx(figures["accuracy"])


def test_the_group_is_refused_where_counts_are_not_known(tmp_path: Path):
    with pytest.raises(UserError, match="no evaluation group 'frequency'"):
        ClassificationMeter(["frequency"])
    assert "train_counts" not in Classification(("a", "b"), (4,)).facts(tmp_path)
    assert "long_tail" not in DataSpec(name="digits").model_dump()
