"""Mirage's distillation beside one epoch of training on all graphs: `python benchmarks/mirage.py` (TU data under
STILLHOUSE_DATA; a minute or two).

Times are CPU seconds of one process, the least of `--rounds`. Also how skewed the trees are, and, with --plots, their
curves as HTML.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from run import keep
from torch import nn

from stillhouse.data import Loader
from stillhouse.data.graph_sets import GraphSetSpec, load_graphs
from stillhouse.distillation.objective import Progress
from stillhouse.methods.graphs.mirage.method import draw_skew
from stillhouse.methods.graphs.mirage.networks import GraphNetwork
from stillhouse.methods.graphs.mirage.selection import Options, distil
from stillhouse.methods.graphs.mirage.training import ClassificationModule, GraphDraws
from stillhouse.methods.graphs.mirage.trees import TreeClasses, skew


def main() -> None:
    """Measure, print and keep results/mirage.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["tu:MUTAG", "tu:PROTEINS", "tu:NCI1"])
    parser.add_argument(
        "--skew", nargs="*", default=["tu:IMDB-BINARY", "tu:PTC_MR"], help="further sets whose trees are counted alone"
    )
    parser.add_argument("--budget", type=float, default=0.19)
    parser.add_argument("--hops", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plots", type=Path, help="folder for trees.html")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {k: vars(options)[k] for k in ("budget", "hops", "width", "batch_size", "rounds")}
    curves, figures["sets"] = {}, {}
    for name in [*options.data, *options.skew]:
        graphs, split = load_graphs(GraphSetSpec(name=name, split=0))
        trees = TreeClasses(graphs, options.hops)
        share, covered = skew(trees.counts, 10_000)
        row: dict[str, float] = {
            "graphs": len(graphs),
            "nodes": graphs.num_nodes,
            "trees": len(trees),
            "top_tenth_covers": float(covered[share <= 0.1][-1]),
        }
        curves[name] = tuple(x.tolist() for x in skew(trees.counts))
        if name in options.data:
            row |= compared(graphs.select(split["train"]), options)
        figures["sets"][name] = row
        print(f"{name:<16}", " ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
    if options.plots:
        print(draw_skew(options.plots, curves, options.hops))
    keep("mirage", figures, "cpu", options.threads)


def compared(train: Any, options: argparse.Namespace) -> dict[str, float]:
    """CPU seconds of the distillation, of its trees, and of one epoch of GIN over all graphs and over the distilled
    set."""
    made = distil(train, budget=options.budget, options=Options(hops=options.hops))
    network = GraphNetwork(
        "gin",
        int(train.labels.max()) + 1,
        int(train.edge_labels.max()) + 1,
        train.num_classes,
        width=options.width,
        layers=options.hops,
    )
    epoch(network, made.graphs, options.batch_size)  # warms up
    distilled = least(lambda: distil(train, budget=options.budget, options=Options(hops=options.hops)), options.rounds)
    known = least(lambda: distil(train, support=made.thresholds, options=Options(hops=options.hops)), options.rounds)
    counted = least(lambda: TreeClasses(train, options.hops), options.rounds)
    full, small = (
        least(lambda g=g: epoch(network, g, options.batch_size), options.rounds) for g in (train, made.graphs)
    )
    return {
        "distil_seconds": distilled,
        "distil_known_support_seconds": known,
        "tree_seconds": counted,
        "epoch_all_seconds": full,
        "epoch_distilled_seconds": small,
        "epochs_that_distillation_costs": distilled / full,
        "node_share": made.graphs.num_nodes / train.num_nodes,
    }


def epoch(network: nn.Module, graphs: Any, batch_size: int) -> None:
    """One pass with Adam."""
    module = ClassificationModule(network).train()  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    for batch in Loader(GraphDraws(graphs, len(graphs), "uniform"), min(batch_size, len(graphs)), shuffle=True):
        optimizer.zero_grad()
        module(batch, Progress()).get("loss").backward()
        optimizer.step()


def least(work: Callable[[], Any], rounds: int) -> float:
    """CPU seconds of the fastest of so many."""
    found = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


if __name__ == "__main__":
    main()
