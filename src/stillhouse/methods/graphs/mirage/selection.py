"""The distillation: trees, frequent sets of them in each class, and their unions; and the baselines that pick whole
graphs of the same size."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.data.graph_sets import Graphs
from stillhouse.errors import UserError
from stillhouse.methods.graphs.mirage.patterns import Patterns, mine, without_shared
from stillhouse.methods.graphs.mirage.trees import TreeClasses, union
from stillhouse.randomness import permutation

STEP = 0.97
"""To what share of itself the support falls from try to try, where a budget is given."""


@dataclass(frozen=True)
class Options:
    """How trees and itemsets are chosen; see the recipe's keys of these names."""

    hops: int = 2
    shared: bool = False
    single: bool = False
    longest: int | None = None
    most: int = 10_000
    largest_tree: int = 10_000


@dataclass(frozen=True)
class DistilledGraphs:
    """A distilled set, the thresholds that made it, whether a cap cut the itemsets short, the trees, and seconds for
    trees and for the whole."""

    graphs: Graphs
    thresholds: dict[int, int]
    truncated: bool
    trees: TreeClasses
    tree_seconds: float
    seconds: float


def distil(
    graphs: Graphs,
    *,
    support: Mapping[int, float] | None = None,
    budget: float | None = None,
    options: Options | None = None,
) -> DistilledGraphs:
    """Labelled graphs -> one union of co-occurring computation trees for every itemset that is frequent in its class.
    No network, no gradient.

    Args:
        graphs: the training graphs.
        support: class -> the fewest graphs of the class that must hold an itemset; below 1: a share of the class's
            graphs.
        budget: or the most nodes of the result, as a share of the nodes of `graphs`: supports fall from the size of
            each class, that of the class with the fewest nodes so far next, until a step would be too large.
        options: hops, and the caps.

    Raises:
        UserError: both or neither of support and budget; a class that is not there; a class that is left without an
            itemset; a tree too large.
    """
    opt, started = options or Options(), time.perf_counter()
    if (support is None) == (budget is None):
        raise UserError(
            "mirage: give exactly one of support (a threshold for each class) and budget (a share of the training "
            "nodes)."
        )
    trees = TreeClasses(graphs, opt.hops)
    tree_seconds = time.perf_counter() - started
    items = trees.items()
    if not opt.single:
        items = [frozenset(i for i in item if trees.size(i) > 1) for item in items]
    classes = torch.unique(graphs.y).tolist()
    groups = {c: [items[g] for g in (graphs.y == c).nonzero().flatten().tolist()] for c in classes}

    def mined(c: int, threshold: int) -> Patterns:
        return mine(groups[c], threshold, longest=opt.longest, most=opt.most)

    def unshared(found: Mapping[int, Patterns]) -> dict[int, Patterns]:
        return dict(found) if opt.shared else dict(zip(found, without_shared(list(found.values()))))

    chosen: dict[int, Patterns] = {}
    if support is not None:
        thresholds = _thresholds(support, {c: len(g) for c, g in groups.items()})
        chosen = unshared({c: mined(c, thresholds[c]) for c in classes})
        for c, one in chosen.items():
            if not len(one):
                raise UserError(_empty(c, f"{thresholds[c]} of its {len(groups[c])} graphs", opt, f"lower support.{c}"))
    else:
        assert budget is not None
        now, thresholds = {c: len(g) for c, g in groups.items()}, {}
        found = {c: mined(c, now[c]) for c in classes}
        while True:
            kept = unshared(found)
            nodes = {c: sum(trees.size(i) for p in one.itemsets for i in p) for c, one in kept.items()}
            if sum(nodes.values()) > budget * graphs.num_nodes:
                break
            if all(map(len, kept.values())):
                thresholds, chosen = dict(now), kept
            falling = [c for c in classes if now[c] > 1 and not found[c].truncated]
            if not falling:
                break
            least = min(falling, key=nodes.__getitem__)
            now[least] = min(now[least] - 1, round(STEP * now[least]))
            found[least] = mined(least, now[least])
        if not chosen:
            raise UserError(
                f"mirage: no support gives every class an itemset within {budget:g} of the {graphs.num_nodes} "
                "training "
                "nodes; raise budget, or set "
                f"{'longest to limit itemsets' if opt.shared else 'shared: keep'}."
            )
    made = union(
        [[trees.expand(i, opt.largest_tree) for i in p] for one in chosen.values() for p in one.itemsets],
        [c for c, one in chosen.items() for _ in one.itemsets],
        [float(s) for one in chosen.values() for s in one.support],
    )
    return DistilledGraphs(
        made, thresholds, any(p.truncated for p in chosen.values()), trees, tree_seconds, time.perf_counter() - started
    )


def random_graphs(graphs: Graphs, nodes: int, *keys: int | str) -> Tensor:
    """Ids of random graphs, the classes in turn, until the next would pass `nodes` nodes in all; at least one of each
    class."""
    orders = [(graphs.y == c).nonzero().flatten() for c in torch.unique(graphs.y)]
    return _in_turn([rows[permutation(len(rows), "random", *keys, c)] for c, rows in enumerate(orders)], graphs, nodes)


def herded_graphs(graphs: Graphs, nodes: int, trees: TreeClasses) -> Tensor:
    """Ids by herding: in each class, the next graph is the one that brings the mean of its tree frequencies closest to
    that of the class."""
    places = graphs.graph_of * len(trees) + trees.of_node
    counts = torch.bincount(places, minlength=len(graphs) * len(trees)).view(len(graphs), len(trees)).float()
    counts /= counts.sum(1, keepdim=True)
    orders = []
    for c in torch.unique(graphs.y):
        rows = (graphs.y == c).nonzero().flatten()
        x = counts[rows]
        mean, total = x.mean(0), torch.zeros(x.shape[1])
        taken: list[int] = []
        used = 0
        free = torch.ones(len(rows), dtype=torch.bool)
        while free.any() and used <= nodes:
            # |(total + x_i) / k - mean|^2 is smallest, up to a constant, where |x_i|^2 - 2 x_i . (k mean - total) is
            score = x.square().sum(1) - 2 * x @ ((len(taken) + 1) * mean - total)
            best = int(score.masked_fill(~free, float("inf")).argmin())
            free[best] = False
            taken.append(best)
            total += x[best]
            used += int(graphs.nodes[rows[best] + 1] - graphs.nodes[rows[best]])
        orders.append(rows[torch.tensor(taken)])
    return _in_turn(orders, graphs, nodes)


def _in_turn(orders: list[Tensor], graphs: Graphs, nodes: int) -> Tensor:
    sizes = graphs.nodes.diff()
    chosen: list[int] = []
    used = 0
    for turn in range(max(map(len, orders))):
        for rows in orders:
            if turn >= len(rows):
                continue
            row = int(rows[turn])
            if turn and used + int(sizes[row]) > nodes:
                return torch.tensor(chosen)
            chosen.append(row)
            used += int(sizes[row])
    return torch.tensor(chosen)


def _thresholds(support: Mapping[int, float], sizes: Mapping[int, int]) -> dict[int, int]:
    """Counts from counts and shares, for every class."""
    for c in support:
        if c not in sizes:
            raise UserError(
                f"mirage: support names class {c}, but the training graphs have the classes "
                f"{', '.join(map(str, sizes))}."
            )
    for c in sizes:
        if c not in support:
            raise UserError(f"mirage: support has no threshold for class {c}.")
        if not support[c] > 0:
            raise UserError(f"mirage: support.{c} must be above 0; given: {support[c]}.")
    return {c: max(1, round(support[c] * sizes[c])) if support[c] < 1 else int(support[c]) for c in sizes}


def _empty(c: int, theta: str, opt: Options, hint: str) -> str:
    why = "" if opt.shared else " that is not as frequent in another class"
    return (
        f"mirage: class {c} has no set of trees in {theta}{why}; {hint}{'' if opt.shared else ', or set shared: keep'}."
    )
