"""MCMI: what the conditional information is, what its centroids do, and that fine-tuning, few-shot and omitted classes
run as the recipe says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from stillhouse.config.specs import DataSpec, ModelSpec, TrainSpec
from stillhouse.data import DataBundle, Loader, load
from stillhouse.data.subset import Subset
from stillhouse.distillation.distillation import Distillation
from stillhouse.errors import UserError
from stillhouse.methods.classification.mcmi import (
    MCMI,
    OutputStatistics,
    conditional_information,
    mcmi_loss,
    updated_centroids,
)
from stillhouse.models import build
from stillhouse.runs.execution import execute
from stillhouse.runs.recipe import validate
from stillhouse.training.engine import fit

LOGITS = 2 * torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(60) % 5


def statistics(logits: torch.Tensor = LOGITS, labels: torch.Tensor = LABELS) -> OutputStatistics:
    seen = OutputStatistics(5)
    for rows, ids in zip(logits.split(16), labels.split(16)):
        seen.add(rows, ids)
    return seen


def test_information_at_the_class_means_is_what_entropy_the_mean_adds():
    seen = statistics()
    p, q = LOGITS.double().softmax(-1), seen.centroids().double()
    entropy = lambda x: -(x * x.log()).sum(-1)  # noqa: E731
    expected = sum((y == LABELS).sum() * (entropy(q[y]) - entropy(p[y == LABELS]).mean()) for y in range(5)) / 60
    assert seen.information() == pytest.approx(float(expected), rel=1e-5)
    assert float(conditional_information(LOGITS, LABELS, seen.centroids())) == pytest.approx(
        seen.information(), rel=1e-5
    )


def test_no_other_centroids_give_less_information():
    seen = statistics()
    for seed in range(3):
        other = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)).softmax(-1)
        assert seen.information(other) > seen.information()
        assert seen.information(0.9 * seen.centroids() + 0.1 * other) > seen.information()


def test_constant_outputs_per_class_carry_no_information_and_lambda_zero_is_cross_entropy():
    assert statistics(LOGITS[:5][LABELS]).information() == pytest.approx(0, abs=1e-7)
    assert torch.equal(mcmi_loss(LOGITS, LABELS, statistics().centroids(), 0.0), F.cross_entropy(LOGITS, LABELS))


def test_collapsed_outputs_and_zero_centroids_stay_finite():
    logits = (1000 * F.one_hot(LABELS, 5).float()).requires_grad_()
    loss = mcmi_loss(logits, LABELS, torch.eye(5)[[1, 2, 3, 4, 0]], 0.3)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_a_class_without_samples_is_named():
    with pytest.raises(UserError, match="class 3 has no training sample"):
        statistics(LOGITS[LABELS != 3], LABELS[LABELS != 3]).centroids()


def test_soft_labels_and_negative_lambda_are_refused():
    with pytest.raises(UserError, match="class ids"):
        conditional_information(LOGITS, F.one_hot(LABELS, 5).float(), torch.eye(5))
    with pytest.raises(UserError, match="lam must be at least 0"):
        MCMI(lam=-0.1)


def test_moved_centroids_stay_distributions():
    moved = updated_centroids(torch.eye(5), LOGITS.view(5, 12, 5), 0.9)
    assert torch.allclose(moved.sum(-1), torch.ones(5)) and (moved > 0).all()


@pytest.fixture(scope="module")
def digits() -> DataBundle:
    return load(DataSpec(name="digits", size=300, augment="plain"))


def tuned(digits: DataBundle, folder: Path, **options: object) -> OutputStatistics:
    torch.manual_seed(0)
    network = build(ModelSpec(model="stillhouse:mlp", options={"widths": [32]}), 10, digits.input_shape)
    plain = digits.dataset("train", train=False)
    objective = MCMI(images=plain, guard=1.0, **options)
    train = TrainSpec(epochs=8, batch_size=32, optimizer={"name": "adam", "lr": 3e-3, "weight_decay": 0})
    module = Distillation(network, None, [objective])
    fit(
        module,
        Loader(plain, 32, shuffle=True, drop_last=True),
        train,
        folder=folder,
        splits={"train": Loader(plain, 256)},
        cpu=True,
    )
    seen = OutputStatistics(10)
    for batch in Loader(plain, 256):
        seen.add(network(batch["input"]).detach(), batch["label"])
    return seen


@pytest.mark.parametrize("when", ["once", "epoch", "ema"])
def test_information_of_the_teacher_rises_with_lambda(digits: DataBundle, tmp_path: Path, when: str):
    plain, raised = (tuned(digits, tmp_path / str(lam), lam=lam, centroids=when) for lam in (0.0, 0.3))
    assert raised.information() > 1.02 * plain.information()
    assert raised.accuracy() > plain.accuracy() - 0.05


def test_a_runaway_teacher_stops_with_a_sentence(digits: DataBundle, tmp_path: Path):
    torch.manual_seed(0)
    network = build(ModelSpec(model="stillhouse:mlp", options={"widths": [32]}), 10, digits.input_shape)
    plain = digits.dataset("train", train=False)
    alone, away = (
        TrainSpec(epochs=5, batch_size=32, optimizer={"name": "adam", "lr": 3e-3}),
        TrainSpec(epochs=9, batch_size=32, optimizer={"lr": 0.1}),
    )
    splits = {"train": Loader(plain, 256)}
    fit(
        Distillation(network, None, [MCMI(lam=0.0)]),
        Loader(plain, 32, shuffle=True),
        alone,
        folder=tmp_path / "a",
        splits=splits,
        cpu=True,
    )
    with pytest.raises(UserError, match=r"ran away: training accuracy fell from .*lam 2"):
        fit(
            Distillation(network, None, [MCMI(lam=2.0, centroids="once")]),
            Loader(plain, 32, shuffle=True),
            away,
            folder=tmp_path / "b",
            splits=splits,
            cpu=True,
        )


def recipe(**changes: object) -> dict:
    quick = {"epochs": 1, "batch_size": 64, "optimizer": {"name": "adam", "lr": 1e-3}}
    return {
        "method": "mcmi",
        "data": {"name": "digits", "size": 200},
        "teacher": {
            "model": "stillhouse:mlp",
            "options": {"widths": [16]},
            "data": {"name": "digits", "val": 0.1},
            "train": quick,
        },
        "fine_tune": {"train": quick},
        "student": {"model": "stillhouse:mlp", "options": {"widths": [8]}},
        "objectives": ["ce", "kd"],
        "train": quick,
        "evaluate": ["accuracy"],
        **changes,
    }


def test_the_omitted_class_is_never_seen_but_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    figures = execute(
        validate(
            recipe(
                omit=[3],
                objectives=["ce"],
                train={"epochs": 15, "batch_size": 32, "optimizer": {"name": "adam", "lr": 1e-2}},
            )
        ),
        tmp_path / "run",
        cpu=True,
    )
    assert figures["accuracy_omitted"] == 0.0 and figures["accuracy_seen"] >= figures["accuracy"]
    assert {"teacher_cmi", "teacher_cmi_before", "teacher_accuracy"} <= set(figures)


def test_an_omitted_class_that_does_not_exist_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="omit: there is no class 10"):
        execute(validate(recipe(omit=[10], fine_tune=None)), tmp_path / "run", cpu=True)


def test_a_subset_is_numbered_anew_and_keeps_its_samples(digits: DataBundle):
    whole = digits.dataset("train", train=False)
    rows = [5, 3, 250]
    batch = next(iter(Loader(Subset(whole, rows), 8)))
    assert batch["index"].tolist() == [0, 1, 2]
    assert all(
        torch.equal(batch["input"][i], whole[r]["input"]) and batch["label"][i] == whole[r]["label"]
        for i, r in enumerate(rows)
    )
    soft = torch.eye(10)[[1, 2, 3]]
    assert torch.equal(next(iter(Loader(Subset(whole, rows, soft), 8)))["label"], soft)
    with pytest.raises(UserError, match="rows must be from 0 to 299"):
        Subset(whole, [300])
