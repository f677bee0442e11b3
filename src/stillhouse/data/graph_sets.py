"""Sets of labelled graphs for graph classification: TU data sets by name, lists of PyTorch Geometric graphs, npz files;
all of a set in a few flat tensors.

Nodes and edges carry one integer label each. Feature rows become labels by their distinct values; continuous ones are
cut into bins first; graphs that have neither are labelled by the nodes' degrees. Raw files are read in place: nothing
is written next to them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stillhouse.config.specs import Spec
from stillhouse.errors import MissingExtra, UserError, unknown
from stillhouse.files import cache_folder, digest
from stillhouse.randomness import permutation

MOST_LABELS = 4096
"""Distinct feature rows that are still read as labels."""


class GraphSetSpec(Spec):
    """A set of graphs by name, and its split."""

    name: str = Field(
        description="tu:MUTAG | npz:PATH (the tensors of `Graphs`) | pyg:PATH (a saved list of torch_geometric Data)"
    )
    root: str | None = Field(
        None,
        description="Folder that holds the data; default: --data-root, then STILLHOUSE_DATA, then the user's cache.",
    )
    val: float = Field(0.1, gt=0, lt=1, description="Share of the graphs that picks the best epoch.")
    test: float = Field(0.1, gt=0, lt=1, description="Share of the graphs that is judged on.")
    split: int | None = Field(
        None,
        description="Seed of the random split; default: the run's seed, so that every seed has a split of its own.",
    )
    size: int | None = Field(None, ge=10, description="Keep a random subset of this many graphs.")
    bins: int | None = Field(
        None, ge=2, description="pyg: cut every continuous feature at its quantiles into this many bins."
    )


@dataclass(frozen=True)
class Graphs:
    """G graphs with N nodes and E directed edges in all, as flat tensors; node ids run over the whole set.

    Attributes:
        labels: (N,) int64 node labels, 0 or above.
        edges: (2, E) int64, source and target: messages flow from the first row to the second. An undirected edge is
            there in both directions.
        edge_labels: (E,) int64.
        nodes: (G + 1,) int64: nodes nodes[g] to nodes[g + 1] are those of graph g.
        y: (G,) int64 classes.
        roots: (N,) bool, the nodes that are pooled; None: all.
        weight: (G,) float32, how often each graph stands for one; None: equal.
    """

    labels: Tensor
    edges: Tensor
    edge_labels: Tensor
    nodes: Tensor
    y: Tensor
    roots: Tensor | None = None
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        n, g = len(self.labels), len(self.y)
        if self.nodes.shape != (g + 1,) or int(self.nodes[-1]) != n or (self.nodes.diff() < 1).any():
            raise UserError(
                f"Graphs: nodes must be (G + 1,) = ({g + 1},) offsets that end at N = {n}, with at least one node a "
                "graph."
            )
        if self.edges.ndim != 2 or self.edges.shape[0] != 2 or self.edge_labels.shape != self.edges.shape[1:]:
            raise UserError(
                f"Graphs: edges must be (2, E) and edge_labels (E,); given: {tuple(self.edges.shape)} and "
                f"{tuple(self.edge_labels.shape)}."
            )
        if self.edges.numel() and (int(self.edges.min()) < 0 or int(self.edges.max()) >= n):
            raise UserError(
                f"Graphs: edges name nodes from {int(self.edges.min())} to {int(self.edges.max())}, but there are {n}."
            )
        if any(part.numel() and int(part.min()) < 0 for part in (self.labels, self.edge_labels)):
            raise UserError("Graphs: labels of nodes and edges must be 0 or above.")
        if self.edges.numel() and (self.graph_of[self.edges[0]] != self.graph_of[self.edges[1]]).any():
            raise UserError("Graphs: an edge joins nodes of two graphs.")

    def __len__(self) -> int:
        return len(self.y)

    @property
    def num_nodes(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return int(self.y.max()) + 1

    @property
    def graph_of(self) -> Tensor:
        """(N,) the graph of each node."""
        return torch.repeat_interleave(torch.arange(len(self.y)), self.nodes.diff())

    @property
    def fingerprint(self) -> str:
        parts = [self.labels, self.edges, self.edge_labels, self.nodes, self.y]
        return digest(*(p.numpy() for p in parts))

    @property
    def numbers(self) -> int:
        """Numbers that it takes to write the set down: a label a node, two ends and a label an edge."""
        return self.num_nodes + 3 * self.edges.shape[1]

    def select(self, rows: Tensor) -> Graphs:
        """The graphs of these ids, in this order; an id may come more than once."""
        counts = self.nodes.diff()[rows]
        nodes = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        kept = _ranges(self.nodes[rows], counts)
        ends = self._edge_offsets
        edge_counts = ends.diff()[rows]
        at = _ranges(ends[rows], edge_counts)
        order = self._edge_order[at]
        shift = torch.repeat_interleave(nodes[:-1] - self.nodes[rows], edge_counts)
        return Graphs(
            self.labels[kept],
            self.edges[:, order] + shift,
            self.edge_labels[order],
            nodes,
            self.y[rows],
            None if self.roots is None else self.roots[kept],
            None if self.weight is None else self.weight[rows],
        )

    @property
    def _edge_order(self) -> Tensor:
        """(E,) edges sorted by graph."""
        return self._kept("order", lambda: torch.argsort(self.graph_of[self.edges[1]], stable=True))

    @property
    def _edge_offsets(self) -> Tensor:
        """(G + 1,) where each graph's edges begin in that order."""

        def make() -> Tensor:
            counts = torch.bincount(self.graph_of[self.edges[1]], minlength=len(self.y))
            return torch.cat([counts.new_zeros(1), counts.cumsum(0)])

        return self._kept("offsets", make)

    def _kept(self, name: str, make: Any) -> Tensor:
        """What `make` returns, made once."""
        if f"_{name}" not in self.__dict__:
            object.__setattr__(self, f"_{name}", make())
        return self.__dict__[f"_{name}"]

    def to_pyg(self) -> list[Any]:
        """A list of torch_geometric `Data`: x (n, 1) node labels, edge_index, edge_attr (e, 1), y, and where there are
        any, `roots` and `weight`."""
        Data = _pyg().data.Data
        out = []
        for g in range(len(self)):
            one = self.select(torch.tensor([g]))
            data = Data(x=one.labels[:, None], edge_index=one.edges, edge_attr=one.edge_labels[:, None], y=one.y)
            if one.roots is not None:
                data.roots = one.roots
            if one.weight is not None:
                data.weight = one.weight
            out.append(data)
        return out

    @classmethod
    def from_pyg(cls, graphs: Sequence[Any], bins: int | None = None) -> Graphs:
        """Graphs of torch_geometric `Data`: the distinct rows of `x` and `edge_attr` become labels; without `x`, the
        nodes' in-degrees do.

        Args:
            graphs: each with `edge_index`, `y`, and what it has of `x` (n, D), `edge_attr` (e, D), `num_nodes`.
            bins: cut every column of a continuous `x` at its quantiles into so many bins.

        Raises:
            UserError: no graph, a graph without a class or a node, features in some graphs alone, or too many distinct
                feature rows.
        """
        if not len(graphs):
            raise UserError("The list of graphs is empty.")
        counts, edges, classes, xs, attributes = [], [], [], [], []
        offset = 0
        for i, g in enumerate(graphs):
            if g.get("y") is None or g.y.numel() != 1:
                raise UserError(
                    f"Graph {i} needs one class in `y`; it has {'none' if g.get('y') is None else g.y.numel()}."
                )
            if not g.num_nodes:
                raise UserError(f"Graph {i} has no node.")
            if (g.get("x") is None) != (graphs[0].get("x") is None) or (g.get("edge_attr") is None) != (
                graphs[0].get("edge_attr") is None
            ):
                raise UserError(
                    f"Graph {i} and graph 0 differ in whether they have `x` and `edge_attr`; give all graphs the same."
                )
            index = g.edge_index if g.edge_index is not None else torch.zeros(2, 0, dtype=torch.int64)
            counts.append(g.num_nodes)
            edges.append(index + offset)
            classes.append(int(g.y))
            offset += g.num_nodes
            if g.get("x") is not None:
                xs.append(g.x.reshape(g.num_nodes, -1))
            if g.get("edge_attr") is not None:
                attributes.append(g.edge_attr.reshape(index.shape[1], -1))
        joined = torch.cat(edges, 1)
        labels = _row_labels(torch.cat(xs), bins, "node") if xs else torch.bincount(joined[1], minlength=offset)
        edge_labels = (
            _row_labels(torch.cat(attributes), bins, "edge")
            if attributes
            else torch.zeros(joined.shape[1], dtype=torch.int64)
        )
        nodes = torch.tensor([0, *np.cumsum(counts).tolist()])
        return cls(labels, joined, edge_labels, nodes, _from_zero(torch.tensor(classes)))


def load_graphs(
    spec: GraphSetSpec, data_root: str | Path | None = None, seed: int = 0
) -> tuple[Graphs, dict[str, Tensor]]:
    """The graphs of a spec, and the graph ids of `train`, `val` and `test`.

    Raises:
        UserError: a set that is nowhere, a file that does not hold graphs, or a split that leaves a part empty.
    """
    scheme, _, rest = spec.name.partition(":")
    if scheme == "tu" and rest:
        graphs = tu(rest, spec.root or data_root)
    elif scheme == "npz" and rest:
        graphs = from_npz(Path(rest).expanduser())
    elif scheme == "pyg" and rest:
        graphs = Graphs.from_pyg(_saved(Path(rest).expanduser()), spec.bins)
    else:
        raise unknown("set of graphs", spec.name, ["tu:MUTAG", "tu:PROTEINS", "npz:PATH", "pyg:PATH"])
    order = torch.tensor(permutation(len(graphs), "graphs", seed if spec.split is None else spec.split))
    order = order[: spec.size] if spec.size else order
    test, val = (round(len(order) * share) for share in (spec.test, spec.val))
    if not test or not val or len(order) <= test + val:
        raise UserError(
            f"{spec.name}: {len(order)} graphs cannot be split into shares of {spec.test:g} for test and {spec.val:g} "
            "for validation."
        )
    return graphs, {"test": order[:test], "val": order[test : test + val], "train": order[test + val :]}


def tu(name: str, root: str | Path | None = None) -> Graphs:
    """A TU data set: raw files under `root/tu/NAME/raw`, else downloaded by torch_geometric into the cache.

    Raises:
        UserError: not there and not to be downloaded, or files that do not fit each other.
    """
    base = Path(root or os.environ.get("STILLHOUSE_DATA") or cache_folder() / "data").expanduser()
    folder = base / "tu" / name / "raw"
    if not (folder / f"{name}_A.txt").is_file():
        here = cache_folder() / "data" / "tu"
        folder = here / name / "raw"
        if not (folder / f"{name}_A.txt").is_file():
            try:
                _pyg("datasets").TUDataset(str(here), name)
            except Exception as error:
                raise UserError(
                    f"The TU data set '{name}' is not under '{base / 'tu'}' and could not be downloaded "
                    f"({type(error).__name__}); name the folder that holds "
                    "tu/NAME/raw with --data-root or STILLHOUSE_DATA, or check the name."
                ) from None
    return read_tu(folder, name)


def read_tu(folder: Path, name: str) -> Graphs:
    """The text files of a TU data set in a folder; edges of both directions are as in the file. Without node labels:
    in-degrees."""

    def column(kind: str) -> Tensor | None:
        path = folder / f"{name}_{kind}.txt"
        return torch.from_numpy(np.loadtxt(path, dtype=np.int64, delimiter=",", ndmin=2)) if path.is_file() else None

    pairs, indicator, classes = column("A"), column("graph_indicator"), column("graph_labels")
    if pairs is None or indicator is None or classes is None:
        raise UserError(f"'{folder}' lacks one of {name}_A.txt, {name}_graph_indicator.txt, {name}_graph_labels.txt.")
    graph_of = indicator[:, 0] - 1
    order = torch.argsort(graph_of, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    edges = rank[pairs.T - 1]
    labels, edge_labels = column("node_labels"), column("edge_labels")
    counts = torch.bincount(graph_of, minlength=len(classes))
    return Graphs(
        torch.bincount(edges[1], minlength=len(order)) if labels is None else _row_labels(labels, None, "node")[order],
        edges.contiguous(),
        torch.zeros(edges.shape[1], dtype=torch.int64)
        if edge_labels is None
        else _row_labels(edge_labels, None, "edge"),
        torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        _from_zero(classes[:, 0]),
    )


def from_npz(path: Path) -> Graphs:
    """`labels`, `edges`, `nodes`, `y` and, where there are any, `edge_labels` of a file, as in `Graphs`."""
    if not path.is_file():
        raise UserError(f"There is no file '{path}'.")
    with np.load(path, allow_pickle=False) as held:
        missing = [k for k in ("labels", "edges", "nodes", "y") if k not in held.files]
        if missing:
            raise UserError(
                f"'{path}' holds no array '{missing[0]}'; it needs labels (N,), edges (2, E), nodes (G + 1,) and y "
                "(G,)."
            )
        parts = {
            k: torch.from_numpy(held[k].astype(np.int64))
            for k in held.files
            if k in ("labels", "edges", "nodes", "y", "edge_labels")
        }
    parts.setdefault("edge_labels", torch.zeros(parts["edges"].shape[1], dtype=torch.int64))
    return Graphs(**parts)


def mapped(graphs: Graphs, vocabulary: Tensor, edge_vocabulary: Tensor) -> Graphs:
    """The same graphs with labels numbered by sorted vocabularies, (V,) and (W,); a label that is not there becomes V
    (or W), the unknown."""
    return replace(
        graphs, labels=_numbered(graphs.labels, vocabulary), edge_labels=_numbered(graphs.edge_labels, edge_vocabulary)
    )


def _numbered(labels: Tensor, vocabulary: Tensor) -> Tensor:
    at = torch.searchsorted(vocabulary, labels)
    return (
        torch.where(vocabulary[at.clamp_max(len(vocabulary) - 1)] == labels, at, len(vocabulary))
        if len(vocabulary)
        else torch.zeros_like(labels)
    )


def _row_labels(rows: Tensor, bins: int | None, what: str) -> Tensor:
    """(n, D) -> (n,) the number of each distinct row."""
    if rows.is_floating_point() and not torch.isfinite(rows).all():
        raise UserError(f"The {what} features hold values that are not finite.")
    if bins is not None and rows.is_floating_point():
        cuts = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
        columns = rows.double().T.contiguous()
        rows = torch.stack([torch.bucketize(c, torch.quantile(c, cuts)) for c in columns], 1)
    found, number = torch.unique(rows, dim=0, return_inverse=True)
    if len(found) > MOST_LABELS:
        raise UserError(
            f"The {what} features have {len(found)} distinct rows, so they are not labels; cut continuous features "
            "into bins (`bins: 4`), or give labels."
        )
    return number


def _from_zero(classes: Tensor) -> Tensor:
    return torch.unique(classes, return_inverse=True)[1]


def _ranges(starts: Tensor, counts: Tensor) -> Tensor:
    """The ids start, start + 1, ... of each range, one after the other."""
    ends = counts.cumsum(0)
    within = torch.arange(int(ends[-1]) if len(ends) else 0) - torch.repeat_interleave(ends - counts, counts)
    return torch.repeat_interleave(starts, counts) + within


def _saved(path: Path) -> list[Any]:
    if not path.is_file():
        raise UserError(f"There is no file '{path}'.")
    pyg = _pyg("data")
    try:
        with torch.serialization.safe_globals(
            [pyg.Data, pyg.data.DataEdgeAttr, pyg.data.DataTensorAttr, pyg.storage.GlobalStorage]
        ):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"'{path}' is not a saved list of torch_geometric Data ({type(error).__name__}).") from None
    if not isinstance(held, list):
        raise UserError(f"'{path}' holds a {type(held).__name__}; it must hold a list of torch_geometric Data.")
    return held


def _pyg(part: str | None = None) -> Any:
    import importlib

    try:
        return importlib.import_module("torch_geometric" + (f".{part}" if part else ""))
    except ImportError:
        raise MissingExtra("Reading or writing torch_geometric graphs", "graph") from None
