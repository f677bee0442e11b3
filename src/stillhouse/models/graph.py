"""Networks on the nodes of a graph: GCN, GraphSAGE and GAT of torch_geometric, the MLP that takes features alone, and a
neighbour sampler.

Features may be dense or CSR; a CSR matrix meets a network's first weights as a sparse product.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import MissingExtra, UserError, unknown
from stillhouse.models.registry import register

Conv = Literal["gcn", "sage", "gat"]
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


@register({"node_mlp": {}})
class NodeMLP(nn.Module):
    """A perceptron on node features: (linear, ReLU, dropout) once less than `layers`, then a linear classifier.

    Args:
        width: units of a hidden layer.
        layers: linear layers; 1 is a linear classifier.
        dropout: after each hidden layer.
        num_classes: C.
        input_shape: (D,).
    """

    def __init__(
        self,
        width: int = 128,
        layers: int = 2,
        dropout: float = 0.5,
        num_classes: int = 2,
        *,
        input_shape: tuple[int, ...],
    ) -> None:
        super().__init__()
        if layers < 1 or width < 1 or not 0 <= dropout < 1:
            raise UserError(
                f"node_mlp: layers and width must be at least 1 and dropout in [0, 1); given: {layers}, {width}, "
                f"{dropout}."
            )
        sizes = [math.prod(input_shape), *[width] * (layers - 1)]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.fc = nn.Linear(sizes[-1], num_classes)
        self.dropout = dropout
        self.stage_names = [f"hidden.{i}" for i in range(layers - 1)]

    def embed(self, x: Tensor) -> Tensor:
        """(B, D) features, dense or CSR, to (B, width): what the classifier sees."""
        x = x if x.ndim == 2 else x.flatten(1)
        for layer in self.hidden:
            assert isinstance(layer, nn.Linear)
            x = F.dropout(F.relu(linear(layer, x)), self.dropout, self.training)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) features to (B, C) logits."""
        return linear(self.fc, self.embed(x))


class GNN(nn.Module):
    """A graph network: convolution, ReLU (gcn, sage, gat alike), dropout; nothing on the input, no ReLU after the last.

    Args:
        conv: gcn: symmetric normalisation; sage: the mean of a node and its neighbours, the node counted twice, as
            GraphSAGE's `gcn` aggregator does on a graph that has self loops already; gat: `heads` of width / heads side
            by side, one head of the last layer, attention dropout 0.3.
        inputs: D. width: of a hidden layer. classes: C. layers: convolutions.

    Raises:
        UserError: an unknown convolution, or a width that the heads do not divide.
    """

    def __init__(
        self, conv: Conv, inputs: int, width: int, classes: int, layers: int = 2, dropout: float = 0.5, heads: int = 4
    ) -> None:
        super().__init__()
        if conv not in ("gcn", "sage", "gat"):
            raise unknown("graph convolution", conv, ["gcn", "sage", "gat"])
        if conv == "gat" and width % heads:
            raise UserError(f"gat: a width of {width} does not divide into {heads} heads.")
        geometric = convolutions()
        self.conv, self.dropout = conv, dropout
        self.convs = nn.ModuleList()
        for i in range(layers):
            a, last = inputs if i == 0 else width, i == layers - 1
            if conv == "gat":
                out, count = (classes, 1) if last else (width // heads, heads)
                self.convs.append(geometric.GATConv(a, out, count, dropout=0.3, add_self_loops=False))
            else:  # with its matrix given, GCNConv is the linear map and the product: a GCN or a SAGE
                self.convs.append(
                    geometric.GCNConv(a, classes if last else width, normalize=False, add_self_loops=False)
                )

    def propagation(self, edges: Tensor, nodes: int) -> Tensor:
        """What the convolutions go along: a normalised CSR matrix (N, N), or edges with self loops for gat.

        Args:
            edges: (2, E), both directions, without self loops.
        """
        return with_loops(edges, nodes) if self.conv == "gat" else propagation(edges, nodes, self.conv)

    def forward(self, x: Tensor, along: Tensor) -> Tensor:
        """(N, D) features and `propagation` to (N, C) logits."""
        for i, conv in enumerate(self.convs):
            x = conv(x, along)
            if i < len(self.convs) - 1:
                x = F.dropout(F.relu(x), self.dropout, self.training)
        return x


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer on dense or CSR rows."""
    return x @ layer.weight.t() + layer.bias if x.layout == torch.sparse_csr else layer(x)


def with_loops(edges: Tensor, nodes: int) -> Tensor:
    """Edges (2, E) and a self loop of every node: (2, E + N)."""
    return torch.cat([edges, torch.arange(nodes, device=edges.device).expand(2, -1)], 1)


def propagation(edges: Tensor, nodes: int, kind: Literal["gcn", "sage"]) -> Tensor:
    """The CSR matrix (N, N) of one propagation step: D^-1/2 (A + I) D^-1/2 for gcn, D^-1 (A + 2 I) for sage, D the
    rows' sums."""
    looped = with_loops(edges, nodes)
    value = torch.ones(looped.shape[1], device=edges.device)
    if kind == "sage":
        value[edges.shape[1] :] = 2.0
    degree = torch.zeros(nodes, device=edges.device).index_add(0, looped[0], value)
    value = value * (degree[looped[0]] * degree[looped[1]]).rsqrt() if kind == "gcn" else value / degree[looped[0]]
    return csr(looped, value, nodes)


def csr(index: Tensor, value: Tensor, nodes: int) -> Tensor:
    """A CSR matrix (N, N) of distinct entries: index (2, E), value (E,)."""
    order = torch.argsort(index[0] * nodes + index[1])
    row, col = index[:, order]
    crow = torch.zeros(nodes + 1, dtype=torch.long, device=index.device)
    crow[1:] = torch.bincount(row, minlength=nodes).cumsum(0)
    return torch.sparse_csr_tensor(crow, col, value[order], (nodes, nodes))


def convolutions() -> Any:
    """`torch_geometric.nn`. Raises `MissingExtra` where it is not installed."""
    try:
        import torch_geometric.nn as geometric
    except ImportError:
        raise MissingExtra("A graph network", "graph") from None
    return geometric


class NeighbourSampler:
    """Draws, for a batch of nodes, a few neighbours of each, and a few of each of those: a small graph that holds what
    a GNN needs for the batch.

    Args:
        edges: (2, E), both directions, sorted by the first row, on the host.
        fan_out: neighbours sampled of a node at each hop, with replacement; repeated ones count once. -1: all
            of them.
    """

    def __init__(self, edges: Tensor, nodes: int, fan_out: tuple[int, ...] = (10, 10)) -> None:
        self.fan_out = fan_out
        self._neighbours = edges[1].numpy()
        self._start = np.zeros(nodes + 1, np.int64)
        np.cumsum(np.bincount(edges[0].numpy(), minlength=nodes), out=self._start[1:])

    def sample(self, batch: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Nodes (n,) with the batch's own first, and the edges among them that were drawn, (2, e) in positions of
        `nodes`, both directions."""
        nodes = batch.numpy()
        frontier, reached_edges = nodes, []
        for fan in self.fan_out:
            degree = self._start[frontier + 1] - self._start[frontier]
            frontier, degree = frontier[degree > 0], degree[degree > 0]
            if fan < 0:
                owner = np.repeat(frontier, degree)
                at = np.arange(len(owner)) + np.repeat(self._start[frontier] - (np.cumsum(degree) - degree), degree)
            else:
                owner = np.repeat(frontier, fan)
                at = self._start[owner] + (generator.random(len(owner)) * np.repeat(degree, fan)).astype(np.int64)
            reached = self._neighbours[at]
            reached_edges.append(np.stack([owner, reached]))
            frontier = np.setdiff1d(reached, nodes)
            nodes = np.concatenate([nodes, frontier])
        ends = np.concatenate(reached_edges, 1)
        order = np.argsort(nodes)
        local = order[np.searchsorted(nodes, ends, sorter=order)]
        codes = np.unique(np.concatenate([local[0] * len(nodes) + local[1], local[1] * len(nodes) + local[0]]))
        return torch.from_numpy(nodes), torch.from_numpy(np.stack([codes // len(nodes), codes % len(nodes)]))

    def batches(
        self, nodes: Tensor, size: int, generator: np.random.Generator
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(batch, its graph's nodes, their edges) over all `nodes`, in order."""
        for batch in nodes.split(size):
            yield batch, *self.sample(batch, generator)
