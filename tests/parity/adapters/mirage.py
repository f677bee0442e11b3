"""Computation trees, their unions and frequent patterns against the arrays of `mirage`."""

from __future__ import annotations

import re

import numpy as np
import torch

from parity.case import Case
from stillhouse.data.graph_sets import Graphs
from stillhouse.methods.graphs.mirage.networks import pool
from stillhouse.methods.graphs.mirage.patterns import mine
from stillhouse.methods.graphs.mirage.trees import Tree, TreeClasses, union


def source_graphs(case: Case) -> Graphs:
    """The case's graphs: undirected edges with local ids, both directions made."""
    nodes, ends, pairs = case["node_ptr"], case["edge_ptr"], case["edges"]
    graph_of_edge = torch.repeat_interleave(torch.arange(len(ends) - 1), ends.diff())
    whole = (pairs + nodes[graph_of_edge][:, None]).T
    edges, labels = torch.cat([whole, whole.flip(0)], 1), case["edge_label"].repeat(2)
    return Graphs(case["node_label"], edges, labels, nodes, torch.zeros(len(nodes) - 1, dtype=torch.int64))


def trees(case: Case) -> None:
    found = TreeClasses(source_graphs(case), case.params["hops"])
    expected = case["tree_class"]
    pairs = torch.unique(torch.stack([found.of_node, expected]), dim=1)
    assert pairs.shape[1] == len(found) == int(expected.max()) + 1, "the partition of the nodes differs"
    case.close("tree_size", torch.tensor([found.size(c) for c in found.of_node.tolist()]))
    here = torch.empty(len(found), dtype=torch.int64)
    here[pairs[1]] = found.counts[pairs[0]]
    case.close("class_count", here)
    for c in range(len(found)):
        assert len(found.expand(c)) == found.size(c)


def parsed(text: str) -> Tree:
    """A tree written as `<node,original>` at the root, `<edge,node,original>` at a child, `$` closing a node."""
    labels: list[int] = []
    parents: list[int] = []
    edges: list[int] = []
    path = [-1]
    for token in re.findall(r"<[\d,]+>|\$", text):
        if token == "$":
            path.pop()
            continue
        numbers = [int(n) for n in token[1:-1].split(",")]
        labels.append(numbers[-1])
        parents.append(path[-1])
        edges.append(numbers[0] if len(labels) > 1 else -1)
        path.append(len(labels) - 1)
    return Tree(np.array(labels), np.array(parents), np.array(edges))


def canonical(tree: Tree, at: int = 0) -> tuple:
    children = sorted((int(tree.edge_labels[c]), canonical(tree, c)) for c in np.flatnonzero(tree.parents == at))
    return int(tree.labels[at]), tuple(children)


def tree_union_pool(case: Case) -> None:
    written = [parsed(text) for text in case.params["labels"]]
    graphs = source_graphs(case)
    found = TreeClasses(graphs, case.params["hops"])
    for tree, first in zip(written, graphs.nodes[:-1].tolist()):
        assert canonical(found.expand(int(found.of_node[first]))) == canonical(tree), (
            "the tree of a graph's first node differs"
        )
    made = union([written], [0], [1.0])
    case.close("x", made.labels[:, None])
    case.close("edge_index", made.edges)
    case.close("edge_attr", made.edge_labels[:, None])
    if "roots" in case:
        case.close("roots", made.roots.to(case["roots"].dtype))
    for kind in ("sum", "mean"):
        case.close(
            f"pooled_{kind}",
            pool(case["z"], torch.zeros(len(made.labels), dtype=torch.int64), 1, made.roots, kind),
            atol=1e-6,
        )


def frequent_patterns(case: Case) -> None:
    held = [frozenset(row.nonzero().flatten().tolist()) for row in case["transactions"]]
    found = mine(held, case.params["threshold"])
    width = case["transactions"].shape[1]
    expected = {
        frozenset(row.nonzero().flatten().tolist()): int(s) for row, s in zip(case["patterns"], case["support"])
    }
    assert {frozenset(p): s for p, s in zip(found.itemsets, found.support)} == expected
    assert all(0 <= i < width for p in found.itemsets for i in p)


ADAPTERS = {"trees": trees, "tree_union_pool": tree_union_pool, "frequent_patterns": frequent_patterns}
