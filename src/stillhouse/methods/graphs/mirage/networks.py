"""Message-passing networks over flat sets of graphs, in plain torch: GIN, GCN and GAT with node and edge labels, pooled
over roots where there are any.

The networks of the benchmark that Mirage uses: an embedding of the label, L convolutions of one width with ReLU and
dropout between, and a linear layer on the pooled nodes. Messages use incoming edges alone, so a root of a tree gets
what the node that it came from gets in its own graph: exactly with GIN and GAT; with GCN up to the degrees of the
leaves, which are those of the tree.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.data.graph_sets import Graphs
from stillhouse.signals import Batch

Kind = Literal["gin", "gcn", "gat"]
Pooling = Literal["sum", "mean"]


def pool(x: Tensor, graph_of: Tensor, graphs: int, roots: Tensor | None = None, kind: Pooling = "sum") -> Tensor:
    """(N, D) nodes -> (G, D): their sum or mean over each graph's roots, or over all its nodes where `roots` (N,) is
    None."""
    share = torch.ones_like(graph_of, dtype=x.dtype) if roots is None else roots.to(x.dtype)
    total = x.new_zeros(graphs, x.shape[1]).index_add_(0, graph_of, x * share[:, None])
    if kind == "sum":
        return total
    return total / x.new_zeros(graphs).index_add_(0, graph_of, share).clamp_min(1)[:, None]


class GIN(nn.Module):
    """x_v' = MLP((1 + eps) x_v + sum of relu(x_u + e_uv) over edges u -> v), with an MLP of widths h, 2h, h."""

    def __init__(self, width: int, edge_kinds: int, norm: bool) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(()))
        self.edge = nn.Embedding(edge_kinds, width)
        between = [nn.BatchNorm1d(2 * width)] if norm else []
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), *between, nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, edges: Tensor, edge_labels: Tensor) -> Tensor:
        message = F.relu(x[edges[0]] + self.edge(edge_labels))
        return self.mlp(((1 + self.eps) * x).index_add(0, edges[1], message.to(x.dtype)))


class GCN(nn.Module):
    """x' = W x; x_v'' = relu(x_v' + r) / d_v + sum of relu(x_u' + e_uv) / sqrt(d_u d_v), with d the in-degree plus
    1."""

    def __init__(self, width: int, edge_kinds: int, norm: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.root = nn.Embedding(1, width)
        self.edge = nn.Embedding(edge_kinds, width)

    def forward(self, x: Tensor, edges: Tensor, edge_labels: Tensor) -> Tensor:
        x = self.linear(x)
        degree = x.new_ones(len(x)).index_add_(0, edges[1], x.new_ones(edges.shape[1]))
        scale = (degree[edges[0]] * degree[edges[1]]).rsqrt()
        message = scale[:, None] * F.relu(x[edges[0]] + self.edge(edge_labels))
        return (F.relu(x + self.root.weight) / degree[:, None]).index_add(0, edges[1], message.to(x.dtype))


class GAT(nn.Module):
    """x' = W x; x_v'' = sum of a_uv (x_u' + e_uv) over edges u -> v and u = v, with a the softmax over u of
    leaky_relu(s . x_u' + t . x_v' + r . e_uv)."""

    def __init__(self, width: int, edge_kinds: int, norm: bool, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads if width % heads == 0 else 1
        self.linear = nn.Linear(width, width)
        self.edge = nn.Embedding(edge_kinds, width)
        self.scores = nn.Parameter(torch.empty(3, self.heads, width // self.heads))
        nn.init.xavier_uniform_(self.scores)

    def forward(self, x: Tensor, edges: Tensor, edge_labels: Tensor) -> Tensor:
        n, width = x.shape
        x = self.linear(x).view(n, self.heads, -1)
        kinds = self.edge.weight.view(-1, self.heads, width // self.heads)
        of_source, of_target = (x * self.scores[0]).sum(-1), (x * self.scores[1]).sum(-1)
        of_edge = (kinds * self.scores[2]).sum(-1)[edge_labels]
        own = F.leaky_relu(of_source + of_target, 0.2)
        other = F.leaky_relu(of_source[edges[0]] + of_target[edges[1]] + of_edge, 0.2)
        top = own.detach().scatter_reduce(0, edges[1][:, None].expand_as(other), other.detach(), "amax")
        own, other = (own - top).exp(), (other - top[edges[1]]).exp()
        total = own.index_add(0, edges[1], other)
        out = (own[..., None] * x).index_add(0, edges[1], other[..., None] * (x[edges[0]] + kinds[edge_labels]))
        return (out / total[..., None]).reshape(n, width)


LAYERS: dict[str, type[GIN] | type[GCN] | type[GAT]] = {"gin": GIN, "gcn": GCN, "gat": GAT}


class GraphNetwork(nn.Module):
    """A graph classifier.

    Args:
        kind: `gin`, `gcn` or `gat`.
        node_kinds, edge_kinds: labels that are known; one more row is for those that are not, and starts at zero.
        classes: C.
        width, layers, dropout: of the convolutions.
        pooling: `sum` or `mean`, over roots.
        norm: batch normalisation after each convolution (trees have many leaves, so its statistics differ from those of
            ordinary graphs).
    """

    def __init__(
        self,
        kind: Kind,
        node_kinds: int,
        edge_kinds: int,
        classes: int,
        *,
        width: int = 64,
        layers: int = 2,
        dropout: float = 0.0,
        pooling: Pooling = "sum",
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(node_kinds + 1, width)
        layered = [LAYERS[kind](width, edge_kinds + 1, norm) for _ in range(layers)]
        self.layers = nn.ModuleList(layered)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) if norm else nn.Identity() for _ in range(layers))
        self.head = nn.Linear(width, classes)
        self.dropout, self.pooling = dropout, pooling
        with torch.no_grad():
            self.embedding.weight[-1].zero_()
            for layer in layered:
                layer.edge.weight[-1].zero_()

    def nodes(self, labels: Tensor, edges: Tensor, edge_labels: Tensor) -> Tensor:
        """(N,) labels, (2, E) edges, (E,) edge labels -> (N, width) after the last convolution."""
        x = self.embedding(labels)
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms)):
            x = norm(layer(x, edges, edge_labels))
            x = F.dropout(F.relu(x) if i + 1 < len(self.layers) else x, self.dropout, self.training)
        return x

    def forward(self, batch: Batch) -> Tensor:
        """A batch of `as_batch` -> (G, C) logits."""
        x = self.nodes(batch["node"], batch["edges"], batch["edge"])
        pooled = pool(x, batch["graph"], len(batch["label"]), batch.get("roots"), self.pooling)
        return self.head(F.dropout(pooled, self.dropout, self.training))


def as_batch(graphs: Graphs) -> Batch:
    """A set of graphs as the mapping of tensors that `GraphNetwork` takes."""
    batch = {
        "node": graphs.labels,
        "edges": graphs.edges,
        "edge": graphs.edge_labels,
        "graph": graphs.graph_of,
        "label": graphs.y,
    }
    return batch if graphs.roots is None else {**batch, "roots": graphs.roots}
