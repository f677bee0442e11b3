"""Perceptrons against the graph networks that taught them: inference on Cora and on a million nodes, and what training
costs as a graph grows.

`python benchmarks/graphs.py` measures on one thread of the CPU, in CPU seconds, which a busy machine does not lengthen,
and keeps benchmarks/results/graphs_inference.json and graphs_growth.json. Networks are untrained: what they compute
costs the same. Each size of the curve is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run import keep
from torch import Tensor
from torch.nn import functional as F

from stillhouse.data.node_graphs import GraphSpec, NodeGraph, SyntheticSpec, load_graph, simple_graph, synthetic
from stillhouse.methods.graphs.ff_g2m import LowFrequency, high_frequency_loss
from stillhouse.methods.graphs.vqgraph import Tokenizer
from stillhouse.models.graph import GNN, NeighbourSampler, NodeMLP

SIZES = (10_000, 31_600, 100_000, 316_000, 1_000_000)
WIDTH, LAYERS, FEATURES, CLASSES, CODES = 128, 2, 32, 8, 256
FAN_OUTS = {"10, 10": (10, 10), "15, 10, 5": (15, 10, 5), "all, all": (-1, -1), "all, all, all": (-1, -1, -1)}


def main() -> None:
    """Measure what is asked for and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=("inference", "growth"), default=("inference", "growth"))
    parser.add_argument("--size", type=int, help="measure one size of the curve and print it as JSON")
    parser.add_argument("--largest", type=int, default=SIZES[-1])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.size:
        print(json.dumps(growth(options.size)))
        return
    if "inference" in options.only:
        keep("graphs_inference", {"cora": cora(), "large": large(options.largest)}, "cpu", 1)
    if "growth" in options.only:
        curve = []
        for size in [s for s in SIZES if s <= options.largest]:
            done = subprocess.run(
                [sys.executable, __file__, "--size", str(size)], check=True, capture_output=True, text=True
            )
            curve.append(json.loads(done.stdout.splitlines()[-1]))
            print(curve[-1], flush=True)
        keep("graphs_growth", grown(curve), "cpu", 1)


def grown(curve: list[dict[str, float]]) -> dict[str, Any]:
    """The curve with the exponents of its last tenfold growth."""
    return {
        "curve": curve,
        "slopes": {
            name: slope(curve, name) for name in ("gcn_step", "tokenizer_step", "ff_g2m_step", "peak_mebibytes")
        },
    }


def cora() -> dict[str, Any]:
    """CPU milliseconds for one node, a batch and the whole of Cora: the MLP, and a GCN over all neighbours of the nodes
    asked for."""
    graph = load_graph(GraphSpec(name="planetoid:Cora"))
    graph = replace(graph, x=graph.x.to_dense())  # reading a sparse row takes longer than the MLP does
    mlp, gnn = networks(graph.num_features, graph.num_classes, LAYERS)
    exact = NeighbourSampler(graph.edges, graph.num_nodes, (-1,) * LAYERS)
    out = {str(size): compare(graph, mlp, gnn, exact, size, 30) for size in (1, 32, 512)}
    along = gnn.propagation(graph.edges, graph.num_nodes)
    with torch.no_grad():
        whole = {"mlp": milliseconds(lambda: mlp(graph.x), 10), "gnn": milliseconds(lambda: gnn(graph.x, along), 10)}
    return {**out, "all, the graph in memory": {**whole, "ratio": whole["gnn"] / whole["mlp"]}}


def large(nodes: int) -> dict[str, Any]:
    """The same on a synthetic graph, for some fan-outs of the neighbour sampler."""
    graph = made(nodes)
    out: dict[str, Any] = {}
    for name, fans in FAN_OUTS.items():
        mlp, gnn = networks(FEATURES, CLASSES, len(fans))
        sampler = NeighbourSampler(graph.edges, graph.num_nodes, fans)
        out[name] = {
            str(size): compare(graph, mlp, gnn, sampler, size, 20 if size < 64 else 3)
            for size in ((1, 64, 1024) if fans != (-1, -1, -1) else (1, 64))
        }
    return {"nodes": nodes, "edges": graph.edges.shape[1], "fan_outs": out}


def growth(nodes: int) -> dict[str, float]:
    """CPU seconds of a training step of the GCN, the tokenizer (sampled edge term) and FF-G2M's student, and the
    process's peak memory over its start."""
    mlp, gnn = networks(FEATURES, CLASSES, LAYERS)
    start = peak()
    graph = made(nodes)
    tokenizer = Tokenizer(FEATURES, WIDTH, CLASSES, CODES)
    along = gnn.propagation(graph.edges, nodes)
    with torch.no_grad():
        logits = gnn.eval()(graph.x, along)
    gnn.train()
    low, once = LowFrequency.of(logits, graph.edges), graph.edges[:, graph.edges[0] < graph.edges[1]]
    train = torch.arange(0, nodes, 50)

    def gcn_step() -> None:
        F.cross_entropy(gnn(graph.x, along)[train], graph.labels[train]).backward()

    def tokenizer_step() -> None:
        out = tokenizer(graph.x, along)
        terms = tokenizer.losses(out, graph.edges, 0.03, 0.001, sample=700)
        (
            F.cross_entropy(out["logits"][train], graph.labels[train]) + torch.stack(list(terms.values())).sum()
        ).backward()

    def ff_g2m_step() -> None:
        given = mlp(graph.x)
        (low.loss(given) + high_frequency_loss(given, logits, once)).backward()

    mlp.train()
    steps = {f.__name__: milliseconds(f, 3, warmup=1) / 1000 for f in (gcn_step, tokenizer_step, ff_g2m_step)}
    return {"nodes": nodes, "edges": graph.edges.shape[1], **steps, "peak_mebibytes": peak() - start}


def compare(
    graph: NodeGraph, mlp: NodeMLP, gnn: GNN, sampler: NeighbourSampler, size: int, repeats: int
) -> dict[str, float]:
    """CPU milliseconds of a batch of so many nodes: the MLP; the graph network with its neighbours fetched, and its
    arithmetic alone."""
    draws = [torch.randint(graph.num_nodes, (size,)).unique() for _ in range(repeats + 2)]
    generator = np.random.default_rng(0)

    def fetch(batch: Tensor) -> tuple[Tensor, Tensor]:
        nodes, edges = sampler.sample(batch, generator)
        return graph.rows(nodes), gnn.propagation(edges, len(nodes))

    ready = [fetch(b) for b in draws]
    times = {
        "mlp": over(draws, lambda b: mlp(graph.rows(b))),
        "gnn": over(draws, lambda b: gnn(*fetch(b))[: len(b)]),
        "gnn_arithmetic": over(ready, lambda r: gnn(*r)),
    }
    reached = statistics.mean(len(x) for x, _ in ready)
    return {
        **times,
        "ratio": times["gnn"] / times["mlp"],
        "ratio_arithmetic": times["gnn_arithmetic"] / times["mlp"],
        "nodes_read": reached,
    }


def over(items: list[Any], call: Callable[[Any], Any]) -> float:
    """Median CPU milliseconds of a call over items; the first two warm up. Each time is over enough calls to be seen by
    the clock."""
    times = []
    with torch.no_grad():
        for item in items:
            count, took = 0, 0.0
            start = time.process_time()
            while took < 0.002 and count < 200:
                call(item)
                count += 1
                took = time.process_time() - start
            times.append(1000 * took / count)
    return statistics.median(times[2:])


def milliseconds(call: Callable[[], Any], repeats: int, warmup: int = 2) -> float:
    """Median CPU milliseconds of a call."""
    times = []
    for _ in range(repeats + warmup):
        start = time.process_time()
        call()
        times.append(1000 * (time.process_time() - start))
    return statistics.median(times[warmup:])


def networks(features: int, classes: int, layers: int) -> tuple[NodeMLP, GNN]:
    """An MLP and a GCN of the same width and depth, in evaluation mode."""
    torch.manual_seed(0)
    return NodeMLP(WIDTH, layers, 0.5, classes, input_shape=(features,)).eval(), GNN(
        "gcn", features, WIDTH, classes, layers
    ).eval()


def made(nodes: int) -> NodeGraph:
    """A synthetic graph of mean degree 10."""
    spec = SyntheticSpec(nodes=nodes, degree=10, classes=CLASSES, features=FEATURES)
    return simple_graph(*synthetic(spec, 0), name="synthetic")


def peak() -> float:
    """The most memory that this process has held, in MiB; not getrusage's, which a child takes over from its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def slope(curve: list[dict[str, float]], name: str) -> float:
    """The exponent of a figure in the number of edges between the last size and one a tenth of it, or the first: 1 is
    linear growth."""
    last = curve[-1]
    first = min(curve[:-1], key=lambda c: abs(math.log(c["edges"] * 10 / last["edges"])), default=last)
    return (
        math.log(last[name] / first[name]) / math.log(last["edges"] / first["edges"]) if first is not last else math.nan
    )


if __name__ == "__main__":
    main()
