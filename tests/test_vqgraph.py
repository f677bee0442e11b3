"""VQGraph: the codebook, the reconstruction and token losses, and runs in both protocols."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import stillhouse
from stillhouse.data.node_graphs import GraphSpec, load_graph, simple_graph
from stillhouse.errors import UserError
from stillhouse.methods.graphs import vqgraph
from stillhouse.methods.graphs.vqgraph import Codebook, Tokenizer, Tokens, edge_loss, token_loss
from stillhouse.runs.execution import execute
from stillhouse.runs.recipe import validate


def test_codes_are_read_before_they_move_and_pass_the_gradient_unchanged() -> None:
    torch.manual_seed(0)
    book, x = Codebook(8, 5), torch.randn(20, 5, requires_grad=True)
    before = book.codes.clone()
    quantized, index, loss, read = book(x)
    assert torch.equal(read, before) and torch.allclose(quantized, before[index], atol=1e-6) and loss > 0
    assert torch.equal(index, (F.normalize(x, dim=-1) @ F.normalize(before, dim=-1).t()).argmax(-1))
    weight = torch.randn(20, 5)
    (quantized * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    used = torch.bincount(index, minlength=8) > 0
    assert not torch.equal(book.codes[used], before[used]) and torch.allclose(
        book.codes[~used], before[~used], atol=1e-6
    )


def test_the_codebook_is_saved_but_not_trained_and_stays_in_evaluation() -> None:
    book = Codebook(8, 5)
    assert not list(book.parameters()) and set(book.state_dict()) == {"codes", "cluster_size"}
    book.eval()
    before = book.codes.clone()
    quantized, index, loss, _ = book(torch.randn(20, 5))
    assert loss == 0 and torch.equal(book.codes, before) and torch.equal(quantized, before[index])


def test_a_dead_node_takes_code_0() -> None:
    assert Codebook(8, 5).eval()(torch.zeros(2, 5))[1].tolist() == [0, 0]


def test_products_over_codes_give_what_products_over_nodes_give() -> None:
    graph = load_graph(GraphSpec(name="synthetic"))
    torch.manual_seed(0)
    one, two = Tokenizer(32, 8, 4, 16, 0.0), Tokenizer(32, 8, 4, 16, 0.0, by_code=False)
    two.load_state_dict(one.state_dict())
    along = one.propagation(graph.edges, 600)
    for network in (one, two):
        out = network(graph.x, along)
        (F.cross_entropy(out["logits"], graph.labels) + (out["embedding"] - out["to_nodes"]).square().mean()).backward()
    for (name, a), b in zip(one.named_parameters(), two.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-6), name


def test_the_edge_loss_of_all_nodes_sampled_is_the_exact_one_and_perfect_codes_have_none() -> None:
    graph = load_graph(GraphSpec(name="synthetic"))
    z = torch.randn(600, 8)
    assert torch.equal(edge_loss(z, graph.edges, 600), edge_loss(z, graph.edges))
    sampled = torch.stack([edge_loss(z, graph.edges, 100) for _ in range(20)])
    assert sampled.std() > 0 and abs(sampled.mean() - edge_loss(z, graph.edges)) < 0.1
    cliques = simple_graph(torch.rand(6, 2), torch.arange(6) % 2, [[0, 0, 1, 3, 3, 4], [1, 2, 2, 4, 5, 5]])
    perfect = torch.eye(2).repeat_interleave(3, 0)
    assert edge_loss(perfect, cliques.edges) < 1e-6


def test_equal_codes_and_one_node_do_not_divide_by_zero() -> None:
    z = torch.ones(5, 3, requires_grad=True)
    edge_loss(z, torch.tensor([[0, 1], [1, 0]])).backward()
    assert z.grad.isfinite().all()
    with pytest.raises(UserError, match="at least two nodes"):
        edge_loss(z[:1], torch.zeros(2, 0, dtype=torch.long))


def test_the_token_loss_is_a_divergence_in_its_temperature() -> None:
    codes, vectors = torch.randn(10, 6), torch.randn(7, 6)
    own = -torch.cdist(vectors, codes)
    assert token_loss(vectors, codes, own).abs() < 1e-5
    assert token_loss(vectors, codes, torch.randn(7, 10)) > 0
    cosine = F.normalize(vectors, dim=-1) @ F.normalize(codes, dim=-1).t()
    assert token_loss(vectors, codes, cosine, scores="cosine").abs() < 1e-5


def test_a_student_vector_on_a_code_has_a_finite_gradient() -> None:
    codes = torch.randn(10, 6)
    vectors = codes[:3].clone().requires_grad_()
    token_loss(vectors, codes, torch.randn(3, 10)).backward()
    assert vectors.grad.isfinite().all()


def test_shapes_and_options_that_do_not_fit_are_told() -> None:
    with pytest.raises(UserError, match=r"\(7, 5\), codes \(10, 6\)"):
        token_loss(torch.rand(7, 5), torch.rand(10, 6), torch.rand(7, 10))
    with pytest.raises(UserError, match="temperature must be above 0"):
        token_loss(torch.rand(7, 6), torch.rand(10, 6), torch.rand(7, 10), 0)
    with pytest.raises(UserError, match="at least 2 codes"):
        Codebook(1, 5)


def test_scores_are_the_same_kept_or_computed_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = load_graph(GraphSpec(name="synthetic"))
    tokenizer = Tokenizer(32, 8, 4, 16)
    nodes = torch.tensor([3, 500, 3])
    kept = Tokens(tokenizer, graph).scores(nodes)
    monkeypatch.setattr(vqgraph, "SCORES_IN_MEMORY", 0)
    assert torch.allclose(Tokens(tokenizer, graph).scores(nodes), kept, atol=1e-6)


def run(folder: Path, **changes: object) -> dict[str, float]:
    tree = {
        "method": "vqgraph",
        "data": {"name": "synthetic", "synthetic": {"nodes": 400, "noise": 4}},
        "tokenizer": {
            "codes": 32,
            "width": 16,
            "edge_sample": 100,
            "train": {"epochs": 60, "optimizer": {"name": "adam", "lr": 5e-3}},
        },
        "student": {"width": 32},
        "train": {"epochs": 30, "batch_size": 128},
        **changes,
    }
    return execute(validate(tree), folder, cpu=True)


def test_the_product_predicts_from_features_alone_and_beats_the_plain_mlp(tmp_path: Path) -> None:
    ours, plain = run(tmp_path / "ours"), run(tmp_path / "plain", lamb=1, lamb_tok=0)
    assert ours["teacher_seconds"] == plain["teacher_seconds"], "both take the same tokenizer from the cache"
    assert ours["accuracy"] > plain["accuracy"]
    assert ours["code_information"] > ours["code_information_shuffled"] and ours["codes_used"] > 4
    student = stillhouse.load(tmp_path / "ours")
    assert student(torch.rand(7, 32)).shape == (7, 4) and "to_code" not in dict(student.named_modules())


def test_the_inductive_protocol_with_sampled_neighbours_scores_hidden_nodes(tmp_path: Path) -> None:
    figures = run(
        tmp_path / "run",
        data={"name": "synthetic", "synthetic": {"nodes": 400}, "hide": 0.2},
        tokenizer={"codes": 16, "width": 16, "edge_sample": 50, "fan_out": [5, 5], "train": {"epochs": 10}},
        student_scores="cosine",
    )
    assert figures["accuracy"] == pytest.approx(
        0.8 * figures["accuracy_observed"] + 0.2 * figures["accuracy_hidden"], abs=1e-9
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"student": {"layers": 1}}, "student.layers at least 2"),
        ({"tokenizer": {"codes": 1}}, "tokenizer.codes"),
        ({"student_scores": "dot"}, "'euclidean' or 'cosine'"),
    ],
)
def test_recipes_that_cannot_work_are_refused(tmp_path: Path, changes: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        run(tmp_path / "run", **changes)
