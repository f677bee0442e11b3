"""Graphs whose nodes are classified: Planetoid's raw files, CPF npz, any npz or PyG file, or a synthetic one; with
splits and hidden nodes.

Every graph comes out simple: both directions of an edge, no self loops, no duplicates. A label -1 is a node whose class
is not known. Features that are mostly zero stay sparse. Files are read without running code in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from stillhouse.config.specs import NamedSpec, Spec
from stillhouse.data.dataset import BatchKey
from stillhouse.data.node_files import read_npz, read_planetoid, read_pyg
from stillhouse.data.source import existing, find_root
from stillhouse.data.splits import Splits
from stillhouse.errors import UserError, unknown
from stillhouse.files import digest
from stillhouse.functional.counting import IGNORED
from stillhouse.randomness import key
from stillhouse.signals import Batch
from stillhouse.tasks.nodes import Nodes


class SyntheticSpec(Spec):
    """A random graph whose edges and features both tell something of the class; a million nodes take seconds."""

    nodes: int = Field(600, ge=2)
    degree: float = Field(6.0, ge=0, description="Mean number of neighbours.")
    classes: int = Field(4, ge=2)
    features: int = Field(32, ge=1)
    homophily: float = Field(
        0.8, ge=0, le=1, description="Share of edges drawn inside a class; the rest join any two nodes."
    )
    noise: float = Field(
        2.0,
        ge=0,
        description="Standard deviation of a feature around its class's mean, in units of the spread of the means.",
    )


class GraphSpec(NamedSpec):
    """A graph by name, its features and its split."""

    name: str = Field(
        description="planetoid:Cora | cpf:cora | npz:PATH | pyg:PATH (a saved torch_geometric Data) | synthetic"
    )
    features: Literal["raw", "rows"] = Field(
        "raw", description="rows: each node's features divided by their sum, as Planetoid's own loader does."
    )
    component: Literal["all", "largest"] = Field(
        "all", description="largest: keep the largest connected component alone."
    )
    split: Literal["public", "random"] | None = Field(
        None, description="public: the file's own; default: public where there is one."
    )
    per_class: int = Field(20, ge=1, description="random: training nodes of each class.")
    val_per_class: int = Field(30, ge=1, description="random: validation nodes of each class, where `val` is not set.")
    val: int | None = Field(None, ge=1, description="random: validation nodes in all.")
    test: int | None = Field(None, ge=1, description="random: test nodes; default: all the rest.")
    hide: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the test nodes that is not there, edges and all, until the test: the inductive setting.",
    )
    seed: int = Field(
        0, description="Of random splits and hidden nodes, added to the run's seed; of a synthetic graph alone."
    )
    synthetic: SyntheticSpec = Field(default_factory=SyntheticSpec)

    @model_validator(mode="before")
    @classmethod
    def _by_name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    def bundle(self, data_root: str | Path | None, seed: int) -> NodeBundle:
        return NodeBundle(load_graph(self, seed, data_root))


@dataclass(frozen=True)
class NodeGraph:
    """A graph and which of its nodes are for what.

    Attributes:
        x: features (N, D), float32; a CSR tensor where they are mostly zero.
        labels: (N,) int64, -1 where not known.
        edges: (2, E) int64, both directions of every edge, sorted, without self loops.
        num_classes: C.
        split: node ids of `train`, `val` and `test`, none of them with an unknown label.
        hidden: ids of test nodes that training must not see.
        name: as in the recipe.
    """

    x: Tensor
    labels: Tensor
    edges: Tensor
    num_classes: int
    split: Mapping[str, Tensor]
    hidden: Tensor
    name: str

    @property
    def num_nodes(self) -> int:
        return self.x.shape[0]

    @property
    def num_features(self) -> int:
        return self.x.shape[1]

    @property
    def fingerprint(self) -> str:
        """A hash of features, edges, labels, split and hidden nodes."""
        x = (
            [self.x.crow_indices(), self.x.col_indices(), self.x.values()]
            if self.x.layout == torch.sparse_csr
            else [self.x]
        )
        parts = [*x, self.labels, self.edges, self.hidden, *(self.split[s] for s in ("train", "val", "test"))]
        return digest(self.num_features, self.num_classes, *(p.cpu().numpy() for p in parts))

    def to(self, device: torch.device | str) -> NodeGraph:
        """The same graph on a device."""
        moved = {k: getattr(self, k).to(device) for k in ("x", "labels", "edges", "hidden")}
        return replace(self, **moved, split={k: v.to(device) for k, v in self.split.items()})

    def rows(self, index: Tensor) -> Tensor:
        """Features of some nodes, (B, D), in the layout of `x`."""
        return take_rows(self.x, index)

    def observed(self) -> NodeGraph:
        """The graph without its hidden nodes and their edges, nodes renumbered in order; this graph itself where
        none is hidden."""
        if not len(self.hidden):
            return self
        keep = torch.ones(self.num_nodes, dtype=torch.bool, device=self.labels.device)
        keep[self.hidden] = False
        return self.induced(keep.nonzero().flatten())

    def induced(self, nodes: Tensor) -> NodeGraph:
        """The sub-graph of some nodes, (n,) ids, numbered as given."""
        number = torch.full((self.num_nodes,), -1, device=nodes.device)
        number[nodes] = torch.arange(len(nodes), device=nodes.device)
        edges = number[self.edges]
        split = {k: number[v][number[v] >= 0] for k, v in self.split.items()}
        hidden = number[self.hidden]
        return replace(
            self,
            x=self.rows(nodes),
            labels=self.labels[nodes],
            edges=edges[:, (edges >= 0).all(0)],
            split=split,
            hidden=hidden[hidden >= 0],
        )


@dataclass
class NodeBundle(Splits):
    """A graph as the samples of a task: each split is one batch, the whole graph with the split's labels."""

    graph: NodeGraph
    evaluation_batch: ClassVar[int] = 1
    flip: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.name, self.fingerprint, self.splits = self.graph.name, self.graph.fingerprint, self.graph.split
        self.task = Nodes(tuple(str(c) for c in range(self.graph.num_classes)), self.graph.num_features)

    def dataset(self, split: str, *, train: bool) -> OneGraph:
        """A split: the graph, with the labels of its nodes. Raises `UserError` for a split that is not there."""
        self.require(split)
        return OneGraph(self.graph, split)


@dataclass
class OneGraph:
    """The one sample of a split."""

    graph: NodeGraph
    split: str

    def __len__(self) -> int:
        return 1

    def labels(self) -> Tensor:
        """(N,) class ids, -100 outside the split."""
        labels = torch.full_like(self.graph.labels, IGNORED)
        nodes = self.graph.split[self.split]
        labels[nodes] = self.graph.labels[nodes]
        return labels

    def batch(self, key: BatchKey, seed: int) -> Batch:
        """`input` features (N, D), `edges` (2, E), `label` (N,), and `hidden` (N,): nodes that training must not
        see."""
        hidden = torch.zeros_like(self.graph.labels, dtype=torch.bool)
        hidden[self.graph.hidden] = True
        graph = self.graph
        return {
            "input": graph.x,
            "edges": graph.edges,
            "label": self.labels(),
            "hidden": hidden,
            "index": torch.zeros(1).long(),
        }


def load_graph(spec: GraphSpec, seed: int = 0, data_root: str | Path | None = None) -> NodeGraph:
    """The graph of a spec with its split.

    Args:
        seed: the run's; random splits and hidden nodes are drawn by `spec.seed + seed`.

    Raises:
        UserError: a name, file or split that is not there; a graph of one node, without features, or with edges or
            labels out of range; a class with too few nodes for the split.
    """
    kind, _, name = spec.name.partition(":")
    root = find_root(spec, data_root)
    masks: dict[str, np.ndarray] = {}
    if kind == "synthetic":
        x, labels, edges = synthetic(spec.synthetic, spec.seed)
    elif kind == "planetoid":
        x, labels, edges, masks = read_planetoid(existing(f"planetoid/{name}/raw", root))
    elif kind in ("cpf", "npz"):
        x, labels, edges, masks = read_npz(existing(f"cpf/{name}.npz" if kind == "cpf" else name, root))
    elif kind == "pyg":
        x, labels, edges, masks = read_pyg(existing(name, root))
    else:
        raise unknown(
            "graph",
            spec.name,
            ["planetoid:Cora", "planetoid:CiteSeer", "cpf:cora", "cpf:citeseer", "npz:PATH", "pyg:PATH", "synthetic"],
        )
    graph = simple_graph(x, labels, edges, masks, spec.name)
    if spec.component == "largest":
        graph = graph.induced(largest_component(graph.edges, graph.num_nodes))
    if spec.features == "rows":
        graph = replace(graph, x=rows_to_one(graph.x))
    return with_split(graph, spec, seed)


def simple_graph(
    x: Any, labels: Any, edges: Any, masks: Mapping[str, Any] | None = None, name: str = "graph"
) -> NodeGraph:
    """A `NodeGraph` from arrays, tensors or a scipy matrix, symmetrised and without self loops and duplicates.

    Args:
        x: (N, D) features. labels: (N,), -1 where not known. edges: (2, E) in any direction. masks: boolean (N,) or ids
            of train, val and test.

    Raises:
        UserError: no features, one node, sizes that do not fit, edges or labels out of range, features that are not
            finite.
    """
    features = _features(x, name)
    n = features.shape[0]
    if features.ndim != 2 or not features.shape[1]:
        raise UserError(f"{name}: the nodes have no features, and a student without a graph has nothing else to go by.")
    if n < 2:
        raise UserError(f"{name}: a graph needs at least two nodes; this one has {n}.")
    values = features.values() if features.layout == torch.sparse_csr else features
    if not torch.isfinite(values).all():
        raise UserError(f"{name}: some features are NaN or infinite.")
    y = torch.as_tensor(np.asarray(labels)).long().flatten()
    if len(y) != n:
        raise UserError(f"{name}: {n} nodes have features but {len(y)} have labels.")
    if int(y.min()) < -1 or int(y.max()) < 1:
        raise UserError(
            f"{name}: labels must be class ids from 0, with at least two classes, and -1 where not known; they run "
            f"from {int(y.min())} to {int(y.max())}."
        )
    e = torch.as_tensor(np.asarray(edges)).long().reshape(2, -1)
    if e.numel() and (int(e.min()) < 0 or int(e.max()) >= n):
        raise UserError(
            f"{name}: edges name the nodes {int(e.min())} to {int(e.max())}, but the graph has nodes 0 to {n - 1}."
        )
    e = e[:, e[0] != e[1]]
    codes = torch.unique(torch.cat([e[0] * n + e[1], e[1] * n + e[0]]))
    split = {k: _ids(v, n) for k, v in (masks or {}).items()}
    split = {k: v[y[v] >= 0] for k, v in split.items()}
    empty = torch.zeros(0, dtype=torch.long)
    return NodeGraph(features, y, torch.stack([codes // n, codes % n]), int(y.max()) + 1, split, empty, name)


def with_split(graph: NodeGraph, spec: GraphSpec, seed: int) -> NodeGraph:
    """The graph with its split (its own, or drawn) and its hidden nodes."""
    if spec.split == "public" and not graph.split:
        raise UserError(f"{graph.name} has no split of its own: set data.split to random.")
    drawn = spec.seed + seed
    split = (
        dict(graph.split)
        if graph.split and spec.split != "random"
        else random_split(graph.labels, graph.num_classes, spec, drawn)
    )
    for part in ("train", "val", "test"):
        if not len(split.get(part, ())):
            raise UserError(
                f"{graph.name}: the split has no {part} nodes; set data.split to random, or give the graph a {part} "
                "mask."
            )
    hidden = graph.hidden
    if spec.hide:
        order = torch.from_numpy(np.random.default_rng(key(drawn, "hidden nodes")).permutation(len(split["test"])))
        hidden = split["test"][order[: max(1, round(spec.hide * len(order)))]].sort().values
    return replace(graph, split=split, hidden=hidden)


def random_split(labels: Tensor, classes: int, spec: GraphSpec, seed: int) -> dict[str, Tensor]:
    """So many nodes of each class for training, so many for validation, the rest (or `test` of them) for the test;
    drawn class by class."""
    state, y = np.random.RandomState(seed), labels.numpy()
    need = spec.per_class + (1 if spec.val else spec.val_per_class)
    for c in range(classes):
        there = int((y == c).sum())
        if there < need:
            raise UserError(
                f"Class {c} has {there} nodes with a label, but the split takes {need} of each class; lower "
                "data.per_class."
            )
    train = np.concatenate(
        [state.choice(np.flatnonzero(y == c), spec.per_class, replace=False) for c in range(classes)]
    )
    left = np.setdiff1d(np.flatnonzero(y >= 0), train)
    if spec.val:
        order = state.permutation(left)
        val = order[: spec.val]
    else:
        val = np.concatenate(
            [state.choice(left[y[left] == c], spec.val_per_class, replace=False) for c in range(classes)]
        )
    test = np.setdiff1d(left, val)
    if spec.test:
        test = np.sort(state.choice(test, min(spec.test, len(test)), replace=False))
    return {
        "train": torch.from_numpy(np.sort(train)),
        "val": torch.from_numpy(np.sort(val)),
        "test": torch.from_numpy(test),
    }


def largest_component(edges: Tensor, n: int) -> Tensor:
    """Ids of the nodes of the largest connected component, ascending."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    row, col = edges.numpy()
    _, component = connected_components(coo_matrix((np.ones(len(row), np.int8), (row, col)), (n, n)), directed=False)
    return torch.from_numpy(np.flatnonzero(component == np.bincount(component).argmax()))


def rows_to_one(x: Tensor) -> Tensor:
    """Each row divided by its sum; a row of zeros stays one."""
    if x.layout != torch.sparse_csr:
        total = x.sum(1, keepdim=True)
        return x / torch.where(total == 0, 1.0, total)
    crow = x.crow_indices()
    owner = torch.repeat_interleave(torch.arange(x.shape[0]), crow.diff())
    total = torch.zeros(x.shape[0]).index_add(0, owner, x.values())
    return torch.sparse_csr_tensor(
        crow, x.col_indices(), x.values() / torch.where(total == 0, 1.0, total)[owner], x.shape
    )


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of a dense or CSR matrix, in its layout."""
    if x.layout != torch.sparse_csr:
        return x[index]
    crow = x.crow_indices()
    count = crow[index + 1] - crow[index]
    starts = torch.cat([count.new_zeros(1), count.cumsum(0)])
    at = torch.arange(int(starts[-1]), device=crow.device) + torch.repeat_interleave(crow[index] - starts[:-1], count)
    return torch.sparse_csr_tensor(starts, x.col_indices()[at], x.values()[at], (len(index), x.shape[1]))


def synthetic(spec: SyntheticSpec, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (N, D), labels (N,) and edges (2, E) of a random graph; time and memory grow with nodes and edges
    alone."""
    g = np.random.default_rng(key(seed, "synthetic graph"))
    n, count = spec.nodes, round(spec.nodes * spec.degree / 2)
    labels = np.arange(n) % spec.classes
    ends = g.integers(0, n, (2, count))
    inside = g.random(count) < spec.homophily
    size = -(-n // spec.classes)
    partner = ends[0] % spec.classes + spec.classes * g.integers(0, size, count)  # a node of the same class
    ends[1] = np.where(inside & (partner < n), partner, ends[1])
    means = g.standard_normal((spec.classes, spec.features), dtype=np.float32)
    x = g.standard_normal((n, spec.features), dtype=np.float32)
    x *= spec.noise
    x += means[labels]
    return x, labels, ends


def _features(x: Any, name: str) -> Tensor:
    """(N, D) float32, CSR where fewer than a tenth of many features are not zero."""
    import scipy.sparse

    if isinstance(x, Tensor):
        x = x.detach().cpu().to_dense().numpy()
    if not scipy.sparse.issparse(x):
        x = np.asarray(x, dtype=np.float32)
        if x.ndim != 2:
            raise UserError(f"{name}: features must be a matrix (nodes, features); given: shape {x.shape}.")
        if x.shape[1] < 64 or np.count_nonzero(x) > 0.1 * x.size:
            return torch.from_numpy(np.ascontiguousarray(x))
    sparse = scipy.sparse.csr_matrix(x, dtype=np.float32)
    sparse.sort_indices()
    if sparse.shape[1] < 64 or sparse.nnz > 0.1 * sparse.shape[0] * sparse.shape[1]:
        return torch.from_numpy(sparse.toarray())
    parts = (
        torch.from_numpy(sparse.indptr.astype(np.int64)),
        torch.from_numpy(sparse.indices.astype(np.int64)),
        torch.from_numpy(sparse.data),
    )
    return torch.sparse_csr_tensor(*parts, sparse.shape)


def _ids(mask: Any, n: int) -> Tensor:
    values = torch.as_tensor(np.asarray(mask)).flatten()
    if values.dtype == torch.bool:
        if len(values) != n:
            raise UserError(f"A mask of {len(values)} entries was given for a graph of {n} nodes.")
        return values.nonzero().flatten()
    if len(values) and (int(values.min()) < 0 or int(values.max()) >= n):
        raise UserError(
            f"A split names the nodes {int(values.min())} to {int(values.max())}, but the graph has nodes 0 to {n - 1}."
        )
    return values.long()
