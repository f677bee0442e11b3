"""Mirage: trees are told apart exactly, roots of trees see what their nodes saw, mining is complete, and one small set
trains all networks."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.data.graph_sets import Graphs, GraphSetSpec, load_graphs, tu
from stillhouse.errors import UserError
from stillhouse.methods.graphs.mirage import GraphSet
from stillhouse.methods.graphs.mirage.networks import GraphNetwork, as_batch
from stillhouse.methods.graphs.mirage.patterns import frequent, mine, without_shared
from stillhouse.methods.graphs.mirage.selection import Options, distil, herded_graphs, random_graphs
from stillhouse.methods.graphs.mirage.training import GraphDraws
from stillhouse.methods.graphs.mirage.trees import TreeClasses, skew, union
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.runs.recipe import validate


def graphs(count: int = 12, seed: int = 0, directed: bool = False) -> Graphs:
    """Random graphs with 3 node and 2 edge labels; class 1 has more edges. Self-loops, isolated nodes and graphs of one
    node are among them."""
    r = np.random.default_rng(seed)
    labels, edges, kinds, sizes = [], [], [], [0]
    for g in range(count):
        n = 1 if g == 3 else int(r.integers(3, 9))
        pairs = np.argwhere(r.uniform(size=(n, n)) < (0.15 if g % 2 == 0 else 0.3))
        if not directed:
            pairs = np.array([(u, v) for a, b in pairs if a <= b for u, v in {(a, b), (b, a)}]).reshape(-1, 2)
        kind = [int((a + b) % 2) for a, b in pairs]
        labels += r.integers(3, size=n).tolist()
        edges.append(pairs.T + sizes[-1])
        kinds += kind
        sizes.append(sizes[-1] + n)
    joined = torch.from_numpy(np.concatenate(edges, 1).astype(np.int64))
    return Graphs(
        torch.tensor(labels),
        joined,
        torch.tensor(kinds, dtype=torch.int64),
        torch.tensor(sizes),
        torch.arange(count) % 2,
    )


def tuples(g: Graphs, v: int, hops: int) -> tuple:
    """The tree of a node by definition, children sorted."""
    if not hops:
        return (int(g.labels[v]), ())
    into = (g.edges[1] == v).nonzero().flatten().tolist()
    return int(g.labels[v]), tuple(
        sorted((int(g.edge_labels[e]), tuples(g, int(g.edges[0, e]), hops - 1)) for e in into)
    )


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("hops", [0, 1, 3])
def test_two_nodes_have_one_class_exactly_where_their_trees_are_the_same(hops: int, directed: bool):
    g = graphs(directed=directed)
    found = TreeClasses(g, hops)
    written = [tuples(g, v, hops) for v in range(g.num_nodes)]
    pairs = set(zip(written, found.of_node.tolist()))
    assert len(pairs) == len(set(written)) == len(found)
    assert found.counts.sum() == g.num_nodes and all(len(found.expand(c)) == found.size(c) for c in range(len(found)))


def test_the_numbering_of_trees_does_not_depend_on_the_order_of_graphs():
    g = graphs()
    order = torch.tensor([5, 2, 11, 0, 1, 3, 4, 6, 7, 8, 9, 10])
    a, b = TreeClasses(g, 2), TreeClasses(g.select(order), 2)
    assert [a.items()[i] for i in order.tolist()] == b.items()


@pytest.mark.parametrize("kind", ["gin", "gat"])
def test_a_root_of_a_tree_gets_the_embedding_of_its_node_in_the_graph(kind: str):
    g = graphs()
    trees = TreeClasses(g, 2)
    torch.manual_seed(0)
    network = GraphNetwork(kind, 3, 2, 2, width=8, layers=2).double().eval()
    made = union([[trees.expand(c) for c in trees.of_node.tolist()]], [0], [1.0])
    here = network.nodes(g.labels, g.edges, g.edge_labels)
    there = network.nodes(made.labels, made.edges, made.edge_labels)[made.roots]
    assert (here - there).abs().max() < 1e-10


def test_gcn_roots_come_close_where_degrees_at_the_leaves_differ():
    g = graphs()
    trees = TreeClasses(g, 2)
    torch.manual_seed(0)
    network = GraphNetwork("gcn", 3, 2, 2, width=8, layers=2).double().eval()
    made = union([[trees.expand(c) for c in trees.of_node.tolist()]], [0], [1.0])
    here, there = (
        network.nodes(g.labels, g.edges, g.edge_labels),
        network.nodes(made.labels, made.edges, made.edge_labels)[made.roots],
    )
    assert torch.corrcoef(torch.stack([here.flatten(), there.flatten()]))[0, 1] > 0.8


def test_pooling_counts_roots_alone_and_survives_batching():
    g = graphs(8)
    trees = TreeClasses(g, 2)
    expand = [[trees.expand(c) for c in sorted(i)] for i in trees.items()]
    made = union(expand, g.y.tolist(), [1.0] * 8)
    network = GraphNetwork("gin", 3, 2, 2, width=8, layers=2, pooling="mean").eval()
    whole = network(as_batch(made))
    alone = torch.cat([network(as_batch(made.select(torch.tensor([i])))) for i in range(8)])
    assert torch.allclose(whole, alone, atol=1e-5)
    assert made.select(torch.tensor([6, 6])).roots.sum() == 2 * len(expand[6])


@pytest.mark.parametrize("seed", range(8))
def test_mining_finds_every_frequent_set_and_nothing_else(seed: int):
    r = np.random.default_rng(seed)
    held = [frozenset(np.flatnonzero(row).tolist()) for row in r.uniform(size=(20, 7)) < 0.5]
    brute = {p: n for k in range(1, 8) for p in combinations(range(7), k) if (n := sum(set(p) <= h for h in held)) >= 5}
    found = mine(held, 5)
    assert dict(zip(found.itemsets, found.support)) == brute and not found.truncated
    assert found.support == sorted(found.support, reverse=True)
    assert set(mine(held, 5, longest=2).itemsets) == {p for p in brute if len(p) <= 2}


def test_an_explosion_of_sets_is_cut_at_the_most_frequent_and_said():
    held = [frozenset(range(60))] * 5 + [frozenset({0})] * 3
    found = mine(held, 4, most=100)
    assert len(found) == 100 and found.truncated and found.itemsets[0] == (0,) and found.support[0] == 8
    assert next(frequent(held, 4)) == ((0,), 8)


def test_sets_that_are_frequent_in_two_classes_are_dropped_from_both():
    a, b = mine([frozenset({1, 2})] * 3, 2), mine([frozenset({2, 3})] * 3, 2)
    left = without_shared([a, b])
    assert left[0].itemsets == [(1,), (1, 2)] and left[1].itemsets == [(3,), (2, 3)]


def test_a_budget_is_kept_and_every_class_has_patterns():
    g = graphs(60)
    made = distil(g, budget=0.5, options=Options(hops=1))
    assert made.graphs.num_nodes <= 0.5 * g.num_nodes and set(made.graphs.y.tolist()) == {0, 1}
    same = distil(g, support=made.thresholds, options=Options(hops=1))
    assert torch.equal(same.graphs.labels, made.graphs.labels) and same.graphs.weight.min() >= min(
        made.thresholds.values()
    )
    assert (made.graphs.nodes.diff() > 1).all(), "single nodes are skipped"


def test_a_weighted_graph_says_how_many_graphs_of_its_class_hold_its_trees():
    g = graphs(40)
    made = distil(g, support={0: 0.3, 1: 0.3}, options=Options(hops=1, shared=True, single=True))
    held = [items for items, y in zip(made.trees.items(), g.y.tolist()) if y == 0]
    most = max(sum(c in items for items in held) for c in range(len(made.trees)))
    weight = made.graphs.weight[made.graphs.y == 0]
    assert weight[0] == most and weight.min() >= made.thresholds[0] == round(0.3 * 20)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"support": {0: 2}}, "no threshold for class 1"),
        ({"support": {0: 2, 1: 2, 7: 2}}, "names class 7"),
        ({"support": {0: 0, 1: 2}}, "must be above 0"),
        ({"support": {0: 999, 1: 999}}, "lower support.0"),
        ({}, "exactly one of support"),
        ({"budget": 0.001}, "no support gives every class"),
        ({"support": {0: 2, 1: 2}, "options": Options(hops=1, largest_tree=1)}, "more than the 1 that are allowed"),
    ],
)
def test_what_cannot_be_distilled_is_refused_with_the_key_to_change(options: dict, says: str):
    with pytest.raises(UserError, match=says):
        distil(graphs(20), **options)


def test_trees_of_dense_graphs_are_counted_without_being_built():
    n = 40
    edges = torch.combinations(torch.arange(n)).T
    g = Graphs(
        torch.zeros(n, dtype=torch.int64),
        torch.cat([edges, edges.flip(0)], 1),
        torch.zeros(n * (n - 1), dtype=torch.int64),
        torch.tensor([0, n]),
        torch.tensor([0]),
    )
    trees = TreeClasses(g, 8)
    assert len(trees) == 1 and trees.size(0) == sum(39**k for k in range(9))
    with pytest.raises(UserError, match="use fewer hops"):
        trees.expand(0)


def test_frequency_sampling_draws_classes_alike_and_graphs_by_weight():
    made = union([[TreeClasses(graphs(), 1).expand(0)]] * 3, [0, 0, 1], [3.0, 1.0, 5.0])
    from stillhouse.data import BatchKey

    drawn = GraphDraws(made, 4000, "frequency")
    rows = drawn.rows(BatchKey(0, np.arange(4000), 0, 4000), seed=1)
    shares = torch.bincount(rows, minlength=3) / 4000
    assert torch.allclose(shares, torch.tensor([0.375, 0.125, 0.5]), atol=0.03)
    assert torch.equal(rows[100:200], drawn.rows(BatchKey(0, np.arange(4000), 100, 200), seed=1))
    even = torch.bincount(GraphDraws(made, 300, "uniform").rows(BatchKey(0, np.arange(300), 0, 300), 0))
    assert even.tolist() == [100, 100, 100]


def test_baselines_have_no_more_nodes_and_every_class():
    g = graphs(60)
    for rows in (random_graphs(g, 80, 1), herded_graphs(g, 80, TreeClasses(g, 1))):
        assert len(set(rows.tolist())) == len(rows) > 4 and set(g.y[rows].tolist()) == {0, 1}
        assert g.select(rows).num_nodes <= 80


def test_labels_that_training_never_saw_become_the_unknown():
    g = graphs(10)
    held = GraphSet(g, torch.tensor([0, 2]), torch.tensor([0]), 2, 2, "uniform", 10)
    read = held.read(g)
    assert torch.equal(read.labels == 2, g.labels == 1) and torch.equal(
        read.labels[g.labels == 2], torch.ones(int((g.labels == 2).sum()), dtype=torch.int64)
    )
    assert torch.isfinite(held.network("gat")(as_batch(read))).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"edges": torch.tensor([[0], [99]]), "edge_labels": torch.tensor([0])}, "name nodes from 0 to 99"),
        ({"edges": torch.tensor([[0], [3]]), "edge_labels": torch.tensor([0])}, "joins nodes of two graphs"),
        ({"labels": torch.tensor([0, -1, 0, 0])}, "0 or above"),
        ({"nodes": torch.tensor([0, 4])}, r"\(3,\) offsets"),
        ({"edge_labels": torch.tensor([0, 0, 0])}, r"edges must be \(2, E\)"),
    ],
)
def test_tensors_that_are_no_graphs_are_refused(change: dict, says: str):
    parts = {
        "labels": torch.zeros(4, dtype=torch.int64),
        "edges": torch.tensor([[0], [1]]),
        "edge_labels": torch.tensor([0]),
        "nodes": torch.tensor([0, 2, 4]),
        "y": torch.tensor([0, 1]),
    }
    with pytest.raises(UserError, match=says):
        Graphs(**{**parts, **change})


def test_graphs_of_torch_geometric_come_in_and_go_out(tmp_path: Path):
    data = pytest.importorskip("torch_geometric.data")
    edge = torch.tensor([[0, 1], [1, 0]])
    listed = [
        data.Data(x=torch.eye(3)[[0, 0]], edge_index=edge, y=torch.tensor([1])),
        data.Data(x=torch.eye(3)[2:], edge_index=edge[:, :0], y=torch.tensor([-1])),
    ]
    g = Graphs.from_pyg(listed)
    assert g.labels.tolist() == [1, 1, 0] and g.y.tolist() == [1, 0] and g.num_classes == 2  # rows of x in sorted order
    back = g.to_pyg()
    assert torch.equal(back[0].edge_index, edge) and back[1].num_nodes == 1 and back[1].edge_index.shape == (2, 0)
    torch.save(listed * 20, tmp_path / "listed.pt")
    assert len(load_graphs(GraphSetSpec(name=f"pyg:{tmp_path / 'listed.pt'}"))[0]) == 40
    bare = Graphs.from_pyg([data.Data(edge_index=edge, num_nodes=3, y=torch.tensor([0]))])
    assert bare.labels.tolist() == [1, 1, 0], "without features the degree is the label"
    with pytest.raises(UserError, match="Graph 0 needs one class"):
        Graphs.from_pyg([data.Data(edge_index=edge, num_nodes=2)])
    with pytest.raises(UserError, match="bins"):
        Graphs.from_pyg([data.Data(x=torch.rand(5000, 1), edge_index=edge, y=torch.tensor([0]))])
    assert (
        Graphs.from_pyg([data.Data(x=torch.rand(5000, 1), edge_index=edge, y=torch.tensor([0]))], bins=4).labels.max()
        == 3
    )
    with pytest.raises(UserError, match="differ in whether they have"):
        Graphs.from_pyg([listed[0], data.Data(edge_index=edge, num_nodes=2, y=torch.tensor([0]))])


def test_mutag_is_read_as_published_and_its_trees_are_skewed(data_root: Path):
    g = tu("MUTAG", data_root)
    assert (len(g), g.num_nodes, g.edges.shape[1], g.num_classes) == (188, 3371, 7442, 2)
    trees = TreeClasses(g, 2)
    assert len(trees) == 174
    share, covered = skew(trees.counts, 1000)
    assert covered[share <= 0.1][-1] > 0.83
    with pytest.raises(UserError, match="is not under"):
        tu("MUTAGG", data_root)
    with pytest.raises(UserError, match="cannot be split"):
        load_graphs(GraphSetSpec(name="tu:MUTAG", size=10, val=0.01), data_root)


def small_recipe(path: Path, **changes: object) -> dict:
    g = graphs(80)
    np.savez(path, labels=g.labels, edges=g.edges, edge_labels=g.edge_labels, nodes=g.nodes, y=g.y)
    train = {"epochs": 2, "batch_size": 16, "optimizer": {"name": "adam", "lr": 1e-3, "weight_decay": 0}, "best": "auc"}
    return {
        "method": "mirage",
        "data": {"name": f"npz:{path}"},
        "hops": 2,
        "budget": 0.3,
        "train": train,
        "runs": 1,
        "keep": 1,
        **changes,
    }


def test_a_run_leaves_a_small_set_that_loads_and_trains_three_networks(tmp_path: Path):
    figures = execute(validate(small_recipe(tmp_path / "g.npz")), tmp_path / "run", cpu=True)
    assert (
        figures["node_share"] <= 0.3
        and {"auc_gin", "auc_gcn", "auc_gat"} <= set(figures)
        and (tmp_path / "run" / "trees.html").exists()
    )
    held = load_product(tmp_path / "run")
    assert held.graphs.num_nodes == figures["nodes"] and held.graphs.roots.any() and held.hops == 2
    assert (tmp_path / "run" / "product" / "graphs.safetensors").stat().st_size < 20_000
    assert torch.isfinite(held.network("gcn")(as_batch(held.graphs))).all()


@pytest.mark.parametrize("change", [{"support": {0: 2, 1: 2}}, {"budget": None}, {"keep": 3}])
def test_recipes_that_contradict_themselves_are_refused(tmp_path: Path, change: dict):
    with pytest.raises(UserError, match=r"exactly one of support and budget|cannot be more than runs"):
        validate(small_recipe(tmp_path / "g.npz", **change))


def test_a_split_without_a_class_is_refused_before_anything_is_trained(tmp_path: Path):
    with pytest.raises(UserError, match="lacks a class"):
        execute(
            validate(small_recipe(tmp_path / "g.npz", data={"name": f"npz:{tmp_path / 'g.npz'}", "test": 0.0125})),
            tmp_path / "run",
            cpu=True,
        )
