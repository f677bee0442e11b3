"""Figures of classifiers, cost and statistics, against other implementations and numbers worked out by hand."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.evaluation import classification as C
from stillhouse.evaluation import cost
from stillhouse.evaluation.statistics import mean_interval, paired_difference, standard_deviation
from stillhouse.runs.evaluators import evaluator
from stillhouse.runs.judging import evaluate, figures_of
from stillhouse.tasks.classification import Classification

ORACLES = Path(os.environ.get("STILLHOUSE_ORACLES", Path(__file__).parents[2] / "shared" / "oracles"))


def outputs(n: int = 300, classes: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (n,), generator=g)
    return 2 * torch.randn(n, classes, generator=g) + 1.5 * nn.functional.one_hot(labels, classes), labels


def batches(x: torch.Tensor, y: torch.Tensor, size: int = 64) -> list[dict]:
    return [{"input": a, "label": b} for a, b in zip(x.split(size), y.split(size))]


def test_classifier_figures_match_torchmetrics_and_scikit_learn():
    from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, labels = outputs()
    got = C.evaluate_classifier(nn.Identity(), batches(logits, labels))
    probs = logits.softmax(-1)
    assert got["accuracy"] == pytest.approx(accuracy_score(labels, probs.argmax(-1)))
    assert got["accuracy_top5"] == pytest.approx(top_k_accuracy_score(labels, probs, k=5))
    assert got["nll"] == pytest.approx(
        log_loss(labels, probs.double() / probs.double().sum(-1, keepdim=True)), rel=1e-5
    )
    assert got["brier"] == pytest.approx(((probs.numpy() - np.eye(8)[labels]) ** 2).sum(1).mean(), rel=1e-5)
    for bins in (10, 15):
        expected = multiclass_calibration_error(probs, labels, num_classes=8, n_bins=bins).item()
        assert C.expected_calibration_error(probs, labels, bins) == pytest.approx(expected, rel=1e-5)


def test_calibration_figures_match_the_published_code_of_ps_kd():
    path = ORACLES / "ps_kd" / "calibration_metrics.npz"
    if not path.is_file():
        pytest.skip(f"no oracle at {path}")
    with np.load(path, allow_pickle=False) as z:
        probs, labels = torch.from_numpy(z["probs"]), torch.from_numpy(z["labels"])
        confidence, predicted = probs.max(-1)
        correct = predicted == labels
        assert 100 * C.expected_calibration_error(probs, labels, bins=10) == pytest.approx(float(z["ece"]), rel=1e-5)
        assert 1000 * C.aurc(confidence, correct) == pytest.approx(float(z["aurc"]), rel=1e-5)
        assert 1000 * C.excess_aurc(confidence, correct) == pytest.approx(float(z["eaurc"]), rel=1e-5)


def test_aurc_by_hand():
    confidence, correct = torch.tensor([0.9, 0.5, 0.7, 0.6]), torch.tensor([True, True, False, True])
    assert C.aurc(confidence, correct) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert C.excess_aurc(torch.tensor([3.0, 2, 1]), torch.tensor([True, True, False])) == pytest.approx(0)


def test_aurc_of_tied_confidences_does_not_depend_on_the_order_of_the_data():
    confidence, correct = torch.tensor([1.0, 1.0, 1.0, 0.4]), torch.tensor([False, True, True, True])
    shuffled = torch.tensor([1, 2, 0, 3])
    assert C.aurc(confidence, correct) == pytest.approx(C.aurc(confidence, correct[shuffled]))


def test_a_perfect_and_certain_classifier_has_no_calibration_error():
    got = C.evaluate_classifier(nn.Identity(), batches(200 * torch.eye(4), torch.arange(4)))
    assert got == {"accuracy": 1.0, "nll": 0.0, "ece": 0.0, "brier": 0.0, "aurc": 0.0}


def test_reliability_bins_by_hand():
    probs = torch.tensor([[0.95, 0.05], [0.85, 0.15], [0.6, 0.4], [0.55, 0.45]])
    r = C.reliability(probs, torch.tensor([0, 1, 0, 0]), bins=5)
    torch.testing.assert_close(r.share, torch.tensor([0, 0, 0.5, 0, 0.5]).double())
    torch.testing.assert_close(r.accuracy, torch.tensor([0, 0, 1.0, 0, 0.5]).double())
    torch.testing.assert_close(r.confidence, torch.tensor([0, 0, 0.575, 0, 0.9]).double())


def test_kendall_tau_matches_scipy_over_the_classes_that_are_not_the_label():
    from scipy.stats import kendalltau

    student, labels = outputs(n=20, classes=7)
    teacher = (
        student + torch.randn(student.shape, generator=torch.Generator().manual_seed(1))
    ).round()  # rounded: ties
    expected = [
        kendalltau(np.delete(s, y), np.delete(t, y)).statistic
        for s, t, y in zip(student.numpy(), teacher.numpy(), labels)
    ]
    assert C.kendall_tau(student, teacher, labels) == pytest.approx(np.mean(expected), rel=1e-5)
    assert C.kendall_tau(student, teacher, labels, chunk=100) == pytest.approx(np.mean(expected), rel=1e-5)
    assert C.kendall_tau(student, -student, labels) == pytest.approx(-1)


def test_evaluation_leaves_every_submodule_in_its_own_mode_and_batch_statistics_alone():
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.9))
    net.train()
    net[1].eval()
    before = net[1].running_mean.clone()
    logits, labels = outputs(n=50)
    first, second = (C.evaluate_classifier(net, batches(logits[:, :6], labels)) for _ in range(2))
    assert first == second
    assert [m.training for m in net] == [True, False, True]
    torch.testing.assert_close(net[1].running_mean, before)


def test_inputs_by_keyword_are_evaluated():
    class Text(nn.Module):
        def forward(self, input_ids: torch.Tensor, scale: torch.Tensor) -> dict:
            return {"logits": nn.functional.one_hot(input_ids, 3) * scale}

    batch = {
        "input": {"input_ids": torch.tensor([0, 1, 2]), "scale": torch.tensor(2.0)},
        "label": torch.tensor([0, 1, 1]),
    }
    assert C.evaluate_classifier(Text(), [batch], groups=["accuracy"]) == {"accuracy": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("logits", "labels", "says"),
    [
        (torch.zeros(4, 3), torch.tensor([0, 1, 2, 7]), "run from 0 to 7, but the model has 3 classes"),
        (torch.zeros(4, 3), torch.tensor([0, -1, 2, 1]), "run from -1 to 2"),
        (torch.zeros(4, 3), torch.zeros(4, 3), r"logits \(4, 3\) and labels \(4, 3\)"),
        (torch.zeros(4, 5, 3), torch.zeros(4).long(), r"logits of shape \(B, C\)"),
        (torch.tensor([[0.0, math.nan], [1, 0]]), torch.tensor([0, 1]), "NaN for 1 of 2 samples"),
    ],
)
def test_wrong_outputs_and_labels_get_a_sentence(logits: torch.Tensor, labels: torch.Tensor, says: str):
    with pytest.raises(UserError, match=says):
        C.evaluate_classifier(nn.Identity(), [{"input": logits, "label": labels}])


def test_an_empty_loader_gets_a_sentence():
    with pytest.raises(UserError, match="gave no batch"):
        C.evaluate_classifier(nn.Identity(), [])


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (5, 3, 10, 10), 8 * 10 * 10 * 3 * 9),
        (nn.Conv2d(8, 8, 3, groups=8), (2, 8, 6, 6), 8 * 4 * 4 * 9),
        (nn.Linear(7, 5), (4, 7), 35),
        (nn.LSTM(8, 16, batch_first=True), (3, 5, 8), 5 * 4 * 16 * (8 + 16)),
        (
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
            (3, 5, 16),
            5 * (16 * 48 + 16 * 16 + 2 * 16 * 32) + 2 * 5 * 5 * 16,
        ),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_multiply_adds_are_those_of_one_sample(model: nn.Module, shape: tuple[int, ...], expected: int):
    assert cost.multiply_adds(model, {"input": torch.zeros(shape)}) == expected
    assert model.training
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.enabled


def test_shared_parameters_count_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    assert cost.parameters(net) == 20


def test_latency_puts_the_threads_and_the_mode_back():
    seen = []

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((torch.get_num_threads(), self.training, len(x)))
            return x

    net, threads = Net(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        got = cost.latency(net, {"input": torch.zeros(8, 3)}, repeats=7, warmup=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert seen == [(1, False, 1)] * 9
    assert net.training
    assert 0 < got["low"] <= got["median"] <= got["high"]


def test_file_size_of_a_folder_is_that_of_its_files(tmp_path: Path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_bytes(b"x" * 10)
    (tmp_path / "inner" / "b").write_bytes(b"x" * 5)
    assert cost.file_size(tmp_path) == 15
    assert cost.file_size(tmp_path / "a") == 10
    with pytest.raises(UserError, match="nothing"):
        cost.file_size(tmp_path / "nothing")


def test_paired_difference_matches_scipy():
    from scipy.stats import ttest_rel

    method, baseline = [0.71, 0.74, 0.70, 0.75], [0.70, 0.71, 0.69, 0.735]
    got, expected = paired_difference(method, baseline), ttest_rel(method, baseline).confidence_interval(0.95)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high))
    assert got.mean == pytest.approx(0.01625)
    assert got.n == 4


def test_one_seed_has_a_difference_but_no_interval():
    got = paired_difference([0.8], [0.75])
    assert got.mean == pytest.approx(0.05)
    assert math.isnan(got.low)
    assert math.isnan(got.high)
    assert math.isnan(standard_deviation([0.8]))
    assert all(map(math.isnan, mean_interval([0.8])))


def test_seeds_that_do_not_pair_get_a_sentence():
    with pytest.raises(UserError, match="got 2 values and 3 of the baseline"):
        paired_difference([1, 2], [1, 2, 3])


def test_the_student_evaluator_is_found_by_kind_and_gives_the_groups_asked_for(tmp_path: Path):
    assert evaluator("student") is evaluate
    with pytest.raises(UserError, match="did you mean 'student'"):
        evaluator("studnet")
    logits, labels = outputs(n=40)
    loader = batches(logits, labels)
    (tmp_path / "weights").write_bytes(b"1234")
    net, task = nn.Linear(8, 8), Classification(tuple("abcdefgh"), (8,))
    got = figures_of(net, task, loader, ["accuracy", "cost"], tmp_path)
    assert set(got) == {"accuracy", "accuracy_top5", "parameters", "multiply_adds", "latency_ms", "file_bytes"}
    assert (got["parameters"], got["multiply_adds"], got["file_bytes"]) == (72, 64, 4)
    assert set(figures_of(net, task, loader, ["calibration"])) == {"nll", "ece", "brier", "aurc"}
    with pytest.raises(UserError, match="did you mean 'calibration'"):
        figures_of(net, task, loader, ["calibation"])
