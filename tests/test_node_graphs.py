"""Graphs for node classification: what is read, what is put right, what is refused; and the networks and sampler that
run on them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stillhouse.data.node_files import read_planetoid
from stillhouse.data.node_graphs import GraphSpec, load_graph, rows_to_one, simple_graph, take_rows, with_split
from stillhouse.errors import UserError
from stillhouse.models.graph import GNN, NeighbourSampler, NodeMLP, propagation

X, Y = torch.rand(6, 3), torch.tensor([0, 1, 0, 1, -1, 1])


def pairs(edges: Tensor) -> set[tuple[int, int]]:
    return set(map(tuple, edges.t().tolist()))


def test_directed_double_and_looping_edges_come_out_simple() -> None:
    graph = simple_graph(X, Y, [[0, 0, 0, 2, 3], [1, 1, 0, 0, 2]])
    assert pairs(graph.edges) == {(0, 1), (1, 0), (0, 2), (2, 0), (2, 3), (3, 2)} and graph.edges.shape[1] == 6
    assert graph.num_classes == 2 and graph.num_nodes == 6


def test_a_graph_without_edges_and_its_isolated_nodes_are_fine() -> None:
    graph = simple_graph(X, Y, np.zeros((2, 0)))
    for conv in ("gcn", "sage", "gat"):
        network = GNN(conv, 3, 8, 2).eval()
        assert network(graph.x, network.propagation(graph.edges, 6)).isfinite().all()


@pytest.mark.parametrize(
    ("x", "y", "edges", "says"),
    [
        (X[:, :0], Y, [[0], [1]], "no features"),
        (X[:1], Y[:1], [[], []], "at least two nodes"),
        (X, Y, [[0], [6]], "nodes 0 to 5"),
        (X, Y[:5], [[0], [1]], "6 nodes have features but 5 have labels"),
        (X, Y * 0, [[0], [1]], "at least two classes"),
        (X, Y - 3, [[0], [1]], "-1 where not known"),
        (X * float("nan"), Y, [[0], [1]], "NaN"),
        (X[:, 0], Y, [[0], [1]], "must be a matrix"),
    ],
)
def test_graphs_that_cannot_be_learned_from_are_refused(x: Tensor, y: Tensor, edges: list, says: str) -> None:
    with pytest.raises(UserError, match=says):
        simple_graph(x, y, edges)


def test_a_random_split_is_the_seed_s_and_holds_no_unknown_label() -> None:
    spec = GraphSpec(name="synthetic", per_class=5, val_per_class=7)
    one, same, other = (load_graph(spec, seed) for seed in (3, 3, 4))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    counts = [torch.bincount(one.labels[one.split[s]]).tolist() for s in ("train", "val")]
    assert counts == [[5] * 4, [7] * 4] and sum(map(len, one.split.values())) == 600
    assert len(torch.cat(list(one.split.values())).unique()) == 600
    graph = simple_graph(torch.rand(40, 3), torch.arange(40) % 3 - 1, [[0], [1]])
    split = with_split(graph, GraphSpec(name="x", per_class=2, val_per_class=2), 0).split
    assert all((graph.labels[v] >= 0).all() for v in split.values())


def test_splits_that_do_not_exist_or_do_not_fit_are_refused() -> None:
    graph = simple_graph(X, Y, [[0], [1]])
    with pytest.raises(UserError, match="no split of its own"):
        with_split(graph, GraphSpec(name="x", split="public"), 0)
    with pytest.raises(UserError, match=r"Class 0 has 2 nodes.*data\.per_class"):
        with_split(graph, GraphSpec(name="x"), 0)
    with pytest.raises(UserError, match="no val nodes"):
        with_split(simple_graph(X, Y, [[0], [1]], {"train": [0, 1], "test": [2]}), GraphSpec(name="x"), 0)


def test_hidden_nodes_take_their_edges_along_and_the_rest_keep_their_features() -> None:
    graph = load_graph(GraphSpec(name="synthetic", hide=0.3), 0)
    seen = graph.observed()
    kept = torch.tensor(sorted(set(range(600)) - set(graph.hidden.tolist())))
    assert (
        len(graph.hidden) == round(0.3 * len(graph.split["test"]))
        and not torch.isin(graph.hidden, graph.split["train"]).any()
    )
    assert torch.equal(seen.x, graph.x[kept]) and torch.equal(seen.labels, graph.labels[kept])
    assert {(kept[a].item(), kept[b].item()) for a, b in pairs(seen.edges)} == {
        (a, b) for a, b in pairs(graph.edges) if not {a, b} & set(graph.hidden.tolist())
    }
    assert torch.equal(kept[seen.split["train"]], graph.split["train"])


def test_sparse_features_do_what_dense_ones_do() -> None:
    x = (torch.rand(50, 80) < 0.05).float()
    x[7] = 0
    graph = simple_graph(x, torch.arange(50) % 2, torch.randint(0, 50, (2, 100)))
    assert graph.x.layout == torch.sparse_csr
    rows = torch.tensor([7, 3, 3, 49])
    assert torch.equal(take_rows(graph.x, rows).to_dense(), x[rows])
    assert torch.allclose(rows_to_one(graph.x).to_dense(), rows_to_one(x)) and rows_to_one(x)[7].abs().sum() == 0
    for network, more in (
        (NodeMLP(8, 2, 0.0, 2, input_shape=(80,)), ()),
        (GNN("gcn", 80, 8, 2), (propagation(graph.edges, 50, "gcn"),)),
    ):
        sparse, dense = network.eval()(graph.x, *more), network(x, *more)
        assert torch.allclose(sparse, dense, atol=1e-6)


def test_the_planetoid_files_give_the_published_graphs(data_root: Path) -> None:
    cora = load_graph(GraphSpec(name="planetoid:Cora", features="rows"), data_root=str(data_root))
    assert (cora.num_nodes, cora.num_features, cora.num_classes, cora.edges.shape[1]) == (2708, 1433, 7, 10556)
    assert {k: len(v) for k, v in cora.split.items()} == {"train": 140, "val": 500, "test": 1000}
    assert torch.bincount(cora.labels[cora.split["train"]]).tolist() == [20] * 7
    citeseer = load_graph(GraphSpec(name="planetoid:CiteSeer"), data_root=str(data_root))
    assert (citeseer.num_nodes, citeseer.edges.shape[1], int((citeseer.labels < 0).sum())) == (3327, 9104, 15)


def test_the_cpf_files_give_the_components_of_the_published_table(data_root: Path) -> None:
    sizes = [
        load_graph(GraphSpec(name=f"cpf:{n}", component="largest"), data_root=str(data_root)).num_nodes
        for n in ("cora", "citeseer")
    ]
    assert sizes == [2485, 2110]


def test_a_planetoid_file_that_holds_code_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "ind.x.graph").write_bytes(pickle.dumps({}))
    (tmp_path / "ind.x.test.index").write_text("0\n")
    (tmp_path / "ind.x.allx").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UserError, match="not loaded"):
        read_planetoid(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_own_npz_and_pyg_files_are_read_with_their_masks(tmp_path: Path) -> None:
    masks = {f"{k}_mask": torch.arange(6) // 2 == i for i, k in enumerate(("train", "val", "test"))}
    y, edges = torch.arange(6) % 2, torch.tensor([[0, 1, 2], [1, 2, 3]])
    np.savez(tmp_path / "g.npz", x=X, y=y, edge_index=edges, **masks)
    from_npz = load_graph(GraphSpec(name=f"npz:{tmp_path}/g.npz"))
    assert {k: v.tolist() for k, v in from_npz.split.items()} == {"train": [0, 1], "val": [2, 3], "test": [4, 5]}
    geometric = pytest.importorskip("torch_geometric.data")
    torch.save(geometric.Data(x=X, y=y, edge_index=edges, **masks), tmp_path / "g.pt")
    assert load_graph(GraphSpec(name=f"pyg:{tmp_path}/g.pt")).fingerprint == from_npz.fingerprint
    torch.save({"y": y, "edge_index": edges}, tmp_path / "bare.pt")
    with pytest.raises(UserError, match="no features"):
        load_graph(GraphSpec(name=f"pyg:{tmp_path}/bare.pt"))
    np.savez(tmp_path / "odd.npz", a=X)
    with pytest.raises(UserError, match="x, y, edge_index"):
        load_graph(GraphSpec(name=f"npz:{tmp_path}/odd.npz"))
    with pytest.raises(UserError, match="planetoid:Cora"):
        load_graph(GraphSpec(name="planetoit:Cora"))


def test_gcn_and_sage_propagate_as_defined() -> None:
    edges = simple_graph(X, Y, [[0, 1, 1], [1, 2, 3]]).edges
    a = torch.zeros(6, 6)
    a[edges[0], edges[1]] = 1
    a += torch.eye(6)
    d = a.sum(1)
    assert torch.allclose(propagation(edges, 6, "gcn").to_dense(), a / (d[:, None] * d).sqrt())
    assert torch.allclose(propagation(edges, 6, "sage").to_dense(), (a + torch.eye(6)) / (d + 1)[:, None])
    geometric = pytest.importorskip("torch_geometric.nn")
    ours = GNN("gcn", 3, 8, 2).convs[0]
    theirs = geometric.GCNConv(3, 8)
    theirs.load_state_dict(ours.state_dict())
    assert torch.allclose(theirs(X, edges), ours(X, propagation(edges, 6, "gcn")), atol=1e-6)


def test_the_sampler_s_graphs_are_parts_of_the_whole_with_the_batch_first() -> None:
    graph = load_graph(GraphSpec(name="synthetic"))
    sampler, have = NeighbourSampler(graph.edges, 600, (3, 2)), pairs(graph.edges)
    for batch, nodes, edges in sampler.batches(torch.arange(20, 80), 25, np.random.default_rng(0)):
        assert torch.equal(nodes[: len(batch)], batch) and len(nodes.unique()) == len(nodes)
        assert {(nodes[a].item(), nodes[b].item()) for a, b in pairs(edges)} <= have


def test_with_all_neighbours_drawn_a_sampled_graph_gives_the_whole_graph_s_answer() -> None:
    graph = load_graph(GraphSpec(name="synthetic"))
    network = GNN("sage", 32, 8, 4).eval()
    whole = network(graph.x, network.propagation(graph.edges, 600))[[5, 9]]
    for fan_out in ((1000, 1000), (-1, -1)):
        nodes, edges = NeighbourSampler(graph.edges, 600, fan_out).sample(
            torch.tensor([5, 9]), np.random.default_rng(0)
        )
        part = network(graph.x[nodes], network.propagation(edges, len(nodes)))
        assert len(nodes) < 300 and torch.allclose(part[:2], whole, atol=1e-5)


def test_wrong_networks_are_refused() -> None:
    with pytest.raises(UserError, match="does not divide into 4 heads"):
        GNN("gat", 3, 10, 2)
    with pytest.raises(UserError, match="did you mean 'gcn'"):
        GNN("gcnn", 3, 8, 2)
    with pytest.raises(UserError, match="layers and width"):
        NodeMLP(8, 0, 0.5, 2, input_shape=(3,))
