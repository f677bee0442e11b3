"""FF-G2M and GLNN: identities of their losses, what the ablations leave out, and runs that leave a perceptron."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import stillhouse
from stillhouse.data.node_graphs import simple_graph
from stillhouse.errors import UserError
from stillhouse.methods.graphs.ff_g2m import LowFrequency, high_frequency_loss, low_frequency_loss
from stillhouse.methods.graphs.glnn import soft_label_loss
from stillhouse.runs.execution import execute
from stillhouse.runs.recipe import validate


@pytest.fixture
def graph() -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits (30, 5), and edges with an isolated node."""
    g = torch.Generator().manual_seed(0)
    ends = torch.randint(0, 29, (2, 60), generator=g)
    edges = simple_graph(torch.rand(30, 2), torch.arange(30) % 5, ends).edges
    return torch.randn(30, 5, generator=g), torch.randn(30, 5, generator=g), edges


def test_low_frequency_is_the_mean_over_edges_and_self_loops(graph: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, edges = graph
    i, j = torch.cat([edges, torch.arange(30).expand(2, -1)], 1)
    ls, lt = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    by_edge = (lt[j].exp() * (lt[j] - ls[i])).sum(-1).mean()
    assert torch.allclose(low_frequency_loss(student, teacher, edges), by_edge, rtol=1e-6)


def test_a_student_equal_to_its_teacher_has_no_high_but_a_low_frequency_loss(
    graph: tuple[Tensor, Tensor, Tensor],
) -> None:
    _, teacher, edges = graph
    assert high_frequency_loss(teacher, teacher, edges).abs() < 1e-7
    assert low_frequency_loss(teacher, teacher, edges) > 0.1
    assert low_frequency_loss(torch.ones(30, 5), torch.ones(30, 5), edges).abs() < 1e-6


def test_a_constant_shift_of_all_logits_changes_nothing(graph: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, edges = graph
    shifted = student + torch.tensor([3.0, 3.0, 3.0, 3.0, 3.0])
    for loss in (low_frequency_loss, high_frequency_loss):
        assert torch.allclose(loss(shifted, teacher, edges), loss(student, teacher, edges), atol=1e-5)


def test_high_frequency_takes_raw_logits_not_log_probabilities(graph: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, edges = graph
    given = high_frequency_loss(student, F.log_softmax(teacher, -1), edges)
    assert not torch.allclose(given, high_frequency_loss(student, teacher, edges), rtol=1e-3)


def test_without_edges_low_is_glnn_and_high_is_zero(graph: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, _ = graph
    none = torch.zeros(2, 0, dtype=torch.long)
    assert torch.allclose(low_frequency_loss(student, teacher, none), soft_label_loss(student, teacher), rtol=1e-5)
    assert high_frequency_loss(student.requires_grad_(), teacher, none).item() == 0


def test_one_direction_of_each_edge_is_enough_for_high_frequency(graph: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, edges = graph
    once = edges[:, edges[0] < edges[1]]
    assert torch.allclose(
        high_frequency_loss(student, teacher, once), high_frequency_loss(student, teacher, edges), rtol=1e-5
    )


def test_equal_ends_of_an_edge_get_a_finite_gradient(graph: tuple[Tensor, Tensor, Tensor]) -> None:
    _, teacher, edges = graph
    student = torch.zeros(30, 5, requires_grad=True)
    (high_frequency_loss(student, teacher, edges) + low_frequency_loss(student, teacher, edges)).backward()
    assert student.grad is not None and student.grad.isfinite().all()


def test_half_precision_logits_lose_nothing_but_their_own_rounding(graph: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, edges = graph
    half = high_frequency_loss(student.bfloat16(), teacher, edges)
    assert half.dtype == torch.float32 and torch.allclose(
        half, high_frequency_loss(student.bfloat16().float(), teacher, edges)
    )
    assert LowFrequency.of(teacher.half(), edges).received.dtype == torch.float32


def test_what_does_not_fit_is_told(graph: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, edges = graph
    with pytest.raises(UserError, match="tau must be above 0"):
        high_frequency_loss(student, teacher, edges, 0.0)
    with pytest.raises(UserError, match=r"\(30, 4\)"):
        low_frequency_loss(student[:, :4], teacher, edges)
    with pytest.raises(UserError, match="there are 30"):
        low_frequency_loss(student, teacher, edges + 20)
    with pytest.raises(UserError, match=r"\(2, E\)"):
        high_frequency_loss(student, teacher, edges.t())


def run(folder: Path, **changes: object) -> dict[str, float]:
    tree = {
        "method": "ff_g2m",
        "data": {"name": "synthetic", "synthetic": {"nodes": 300, "noise": 4}},
        "teacher": {"width": 16, "train": {"epochs": 60}},
        "student": {"width": 32},
        "train": {"epochs": 80},
        **changes,
    }
    return execute(validate(tree), folder, cpu=True)


def test_the_product_predicts_from_features_alone_and_beats_the_plain_mlp(tmp_path: Path) -> None:
    ours, plain = run(tmp_path / "ours"), run(tmp_path / "plain", lamb=1)
    assert ours["teacher_accuracy"] == plain["teacher_accuracy"]
    assert ours["accuracy"] > plain["accuracy"] + 0.05
    student = stillhouse.load(tmp_path / "ours")
    assert student(torch.rand(7, 32)).shape == (7, 4) and not student.training
    assert ours["test_selected"] >= ours["accuracy"]


def test_hidden_nodes_are_scored_on_their_own_and_alone(tmp_path: Path) -> None:
    figures = run(tmp_path / "run", data={"name": "synthetic", "synthetic": {"nodes": 300}, "hide": 0.2}, method="glnn")
    assert figures["accuracy"] == pytest.approx(
        0.8 * figures["accuracy_observed"] + 0.2 * figures["accuracy_hidden"], abs=1e-9
    )
    assert "teacher_accuracy_hidden" in figures


def test_drowning_leaves_a_plot_and_the_ablations_figures(tmp_path: Path) -> None:
    figures = run(tmp_path / "run", drowning=True, train={"epochs": 60, "patience": None}, lamb=0.1)
    assert figures["FF-G2M.high_kl"] < figures["GLNN.high_kl"]
    assert figures["FF-G2M.accuracy"] == figures["accuracy"], "the ablation of the full method is the method"
    page = (tmp_path / "run" / "drowning.html").read_text()
    assert all(name in page for name in ("GLNN", "LFD", "HFD", "FF-G2M", "teacher itself"))


def test_a_graph_without_edges_is_trained_on_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has no edges"):
        run(tmp_path / "run", data={"name": "synthetic", "synthetic": {"nodes": 300, "degree": 0}}, train={"epochs": 3})


def test_teachers_are_kept_and_shared_by_their_setting(tmp_path: Path) -> None:
    first = run(tmp_path / "a", data="synthetic", train={"epochs": 2})
    again = run(tmp_path / "b", data={"name": "synthetic"}, train={"epochs": 2}, terms=["soft"])
    other = run(tmp_path / "c", train={"epochs": 2}, teacher={"conv": "gat", "width": 16, "train": {"epochs": 60}})
    assert first["teacher_seconds"] == again["teacher_seconds"] != other["teacher_seconds"]
    assert (
        json.loads((tmp_path / "a" / "product" / "product.json").read_text())["model"]["model"] == "stillhouse:node_mlp"
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": {"batch_size": 32}}, "train.batch_size"),
        ({"terms": ["lo"]}, "'low', 'high' or 'soft'"),
        ({"terms": []}, "at least 1"),
        ({"tau": 0}, "above 0"),
        ({"teacher": {"conv": "gin"}}, "'gcn', 'sage' or 'gat'"),
    ],
)
def test_recipes_that_cannot_work_are_refused(tmp_path: Path, changes: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        run(tmp_path / "run", **changes)
