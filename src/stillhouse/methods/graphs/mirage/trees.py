"""Computation trees: what an L-layer network sees of a node, counted up to isomorphism by colour refinement, and
expanded only when needed.

The tree of a node has its in-neighbours as children, each of them again with all of its in-neighbours, L times (a tree
of walks). Two nodes have the same colour after L rounds iff their trees are isomorphic with node and edge labels; a
round costs a sort of the edges, and no tree is ever built for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from stillhouse.data.graph_sets import Graphs
from stillhouse.errors import UserError


@dataclass(frozen=True)
class Tree:
    """A rooted tree of n nodes in depth-first order; the first node is the root.

    Attributes:
        labels: (n,) int64 node labels.
        parents: (n,) int64 positions, -1 at the root.
        edge_labels: (n,) int64 label of the edge to the parent, -1 at the root.
    """

    labels: np.ndarray
    parents: np.ndarray
    edge_labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class _Level:
    """The colours of one round: label of the root, and the children as (edge label, colour of the round before),
    sorted."""

    labels: np.ndarray  # (K,)
    starts: np.ndarray  # (K + 1,)
    child_edges: np.ndarray  # (children of all colours,)
    child_colours: np.ndarray
    sizes: list[int]  # nodes of each expanded tree; exact integers, however large


class TreeClasses:
    """The isomorphism classes of the L-hop trees of all nodes of a set of graphs.

    The numbering of classes follows the trees themselves (sorted), not the order of the graphs.

    Args:
        graphs: G graphs, N nodes in all.
        hops: L, 0 or above.

    Attributes:
        of_node: (N,) the class of each node.
        counts: (K,) how many nodes have each class.
    """

    def __init__(self, graphs: Graphs, hops: int) -> None:
        if hops < 0:
            raise UserError(f"mirage: hops must be 0 or above; given: {hops}.")
        self.graphs, self.hops = graphs, hops
        labels = graphs.labels.numpy()
        source, target = graphs.edges.numpy()
        edge_labels = graphs.edge_labels.numpy()
        kinds, colour = np.unique(labels, return_inverse=True)
        self._levels = [
            _Level(
                kinds,
                np.zeros(len(kinds) + 1, np.int64),
                np.empty(0, np.int64),
                np.empty(0, np.int64),
                [1] * len(kinds),
            )
        ]
        for _ in range(hops):
            colour = self._refine(labels, source, target, edge_labels, colour)
        self.of_node = torch.from_numpy(colour.astype(np.int64))
        self.counts = torch.bincount(self.of_node, minlength=len(self))

    def __len__(self) -> int:
        return len(self._levels[-1].labels)

    def size(self, tree: int) -> int:
        """Nodes of a class's tree: the walks of at most L steps that end in its root."""
        return self._levels[-1].sizes[tree]

    def items(self) -> list[frozenset[int]]:
        """The set of tree classes of each graph; how often one occurs is dropped."""
        bounds, of_node = self.graphs.nodes.tolist(), self.of_node.tolist()
        return [frozenset(of_node[a:b]) for a, b in pairwise(bounds)]

    def expand(self, tree: int, largest: int = 100_000) -> Tree:
        """One tree of a class. Raises `UserError` where it has more than `largest` nodes."""
        if self.size(tree) > largest:
            raise UserError(
                f"mirage: a {self.hops}-hop tree has {self.size(tree)} nodes, more than the {largest} that are allowed "
                "(largest_tree); use fewer hops."
            )
        labels: list[int] = []
        parents: list[int] = []
        edges: list[int] = []
        todo = [(self.hops, tree, -1, -1)]
        while todo:
            level, colour, parent, edge = todo.pop()
            at = len(labels)
            table = self._levels[level]
            labels.append(int(table.labels[colour]))
            parents.append(parent)
            edges.append(edge)
            a, b = table.starts[colour], table.starts[colour + 1]
            todo += [
                (level - 1, int(table.child_colours[i]), at, int(table.child_edges[i])) for i in range(b - 1, a - 1, -1)
            ]
        return Tree(np.array(labels), np.array(parents), np.array(edges))

    def _refine(
        self, labels: np.ndarray, source: np.ndarray, target: np.ndarray, edge_labels: np.ndarray, colour: np.ndarray
    ) -> np.ndarray:
        """A round: (N,) colours of (label, sorted (edge label, colour) of the in-neighbours)."""
        below = len(self._levels[-1].labels)
        pair = edge_labels * below + colour[source]
        order = np.lexsort((pair, target))
        pair = pair[order].astype(">i8")  # big-endian bytes sort as the numbers do
        ends = np.searchsorted(target[order], np.arange(len(labels) + 1))
        own = labels.astype(">i8")
        keys = [own[v : v + 1].tobytes() + pair[ends[v] : ends[v + 1]].tobytes() for v in range(len(labels))]
        number = {k: i for i, k in enumerate(sorted(set(keys)))}
        rows = [np.frombuffer(k, dtype=">i8").astype(np.int64) for k in number]
        children = np.concatenate([r[1:] for r in rows]) if rows else np.empty(0, np.int64)
        starts = np.concatenate([[0], np.cumsum([len(r) - 1 for r in rows])]).astype(np.int64)
        edges, colours = np.divmod(children, below)
        before = self._levels[-1].sizes
        sizes = [1 + sum(before[c] for c in colours[a:b].tolist()) for a, b in pairwise(starts)]
        self._levels.append(_Level(np.array([r[0] for r in rows], np.int64), starts, edges, colours, sizes))
        return np.array([number[k] for k in keys], dtype=np.int64)


def union(trees: list[list[Tree]], classes: list[int], weight: list[float]) -> Graphs:
    """One graph for each list of trees: their disjoint union, edges from child to parent alone, the roots marked.

    Raises:
        UserError: no list, or an empty one.
    """
    if not trees or not all(trees):
        raise UserError("mirage: a distilled graph needs at least one tree.")
    every = [t for group in trees for t in group]
    offsets = np.concatenate([[0], np.cumsum([len(t) for t in every])])
    child = np.concatenate([o + np.arange(1, len(t)) for o, t in zip(offsets, every)])
    parent = np.concatenate([o + t.parents[1:] for o, t in zip(offsets, every)])
    roots = np.zeros(offsets[-1], dtype=bool)
    roots[offsets[:-1]] = True
    counts = np.cumsum([0, *(sum(map(len, group)) for group in trees)])
    return Graphs(
        torch.from_numpy(np.concatenate([t.labels for t in every]).astype(np.int64)),
        torch.from_numpy(np.stack([child, parent]).astype(np.int64)),
        torch.from_numpy(np.concatenate([t.edge_labels[1:] for t in every]).astype(np.int64)),
        torch.from_numpy(counts.astype(np.int64)),
        torch.tensor(classes),
        torch.from_numpy(roots),
        torch.tensor(weight, dtype=torch.float32),
    )


def skew(counts: Tensor, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """The share of nodes (m,) that the most frequent share (m,) of tree classes covers, thinned to at most so many
    points."""
    falling = np.sort(counts.numpy())[::-1].cumsum()
    at = np.unique(np.linspace(0, len(falling) - 1, min(points, len(falling))).astype(int))
    return (at + 1) / len(falling), falling[at] / falling[-1]
