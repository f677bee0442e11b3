"""Mirage: distils labelled graphs into unions of computation trees that co-occur often, by counting and mining; any
message-passing network trains on them.

paper: Mirage: Model-Agnostic Graph Distillation for Graph Classification
venue: ICLR 2024
arxiv: 2310.09486
task: graph classification
family: dataset distillation
use when: graph networks of several kinds must be trained often on one set of labelled graphs, and the distillation
itself must cost no training
needs: graphs with discrete node labels (edge labels too, where there are any); no teacher and no network

A network with L layers sees a graph as the multiset of its nodes' L-hop trees. Trees are counted by colour refinement,
sets of trees that at least `support` graphs of a class share are mined exactly, and each becomes a graph whose messages
flow to the roots and which is pooled over roots alone. `budget` searches the support from above for a share of the
training nodes, as the paper does by hand. Itemsets that are frequent in several classes are dropped, and single-node
trees skipped, as in the Python scripts (`shared: keep`, `single: keep` are the C++ route). `sampling: frequency` is the
paper's Algorithm 2; `uniform`, the default, is what the released code does and its logs come from. The paper's mining
library misses some itemsets; ours is exact. An epoch is as many draws as there are training graphs, so that all sets
are trained for the same number of steps; `epoch: set` is one pass over the distilled set, as published (`paper`). Test
figures are those of the best validation epoch, over the whole split, of the best `keep` of `runs` networks by
validation. Other picks of the same number of nodes: `random`, `herding` (over tree frequencies); `all` is the whole
training set.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from stillhouse.config.specs import MethodConfig, OptimizerSpec, Spec, TrainSpec
from stillhouse.data.graph_sets import Graphs, GraphSetSpec, load_graphs, mapped
from stillhouse.errors import UserError
from stillhouse.methods.graphs.mirage.networks import GraphNetwork, Kind, Pooling
from stillhouse.methods.graphs.mirage.selection import Options, distil, herded_graphs, random_graphs
from stillhouse.methods.graphs.mirage.training import trained
from stillhouse.methods.graphs.mirage.trees import skew
from stillhouse.randomness import keyed
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Product, read_meta
from stillhouse.runs.run import Run

Select = Literal["mirage", "random", "herding", "all"]


class NetworkSpec(Spec):
    """The networks that are trained on the distilled set."""

    kinds: list[Kind] = Field(default_factory=lambda: list[Kind](["gin", "gcn", "gat"]), min_length=1)
    width: int = Field(64, ge=1)
    layers: int | None = Field(None, ge=1, description="Default: hops.")
    dropout: float = Field(0.1, ge=0, lt=1)
    pooling: Pooling = "sum"
    norm: bool = Field(False, description="Batch normalisation; its statistics on trees are not those on graphs.")


class Config(MethodConfig):
    data: Annotated[GraphSetSpec, BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)]
    hops: int = Field(2, ge=1, description="L: the depth of trees.")
    support: dict[int, float] | None = Field(
        None, description="Class -> fewest graphs that share an itemset; below 1: a share of the class."
    )
    budget: float | None = Field(
        None, gt=0, le=1, description="Or the largest share of the training nodes that the distilled set may have."
    )
    shared: Literal["drop", "keep"] = Field("drop", description="Itemsets that are frequent in more than one class.")
    single: Literal["skip", "keep"] = Field("skip", description="Trees of one node: isolated nodes.")
    longest: int | None = Field(None, ge=1, description="The most trees of an itemset.")
    most: int = Field(10_000, ge=1, description="The most itemsets of a class; the most frequent ones are kept.")
    largest_tree: int = Field(10_000, ge=1, description="Refuse to build a tree of more nodes.")
    select: Select = Field(
        "mirage", description="random, herding: whole graphs of as many nodes; all: the training set."
    )
    sampling: Literal["uniform", "frequency"] = Field(
        "uniform", description="frequency: classes alike, itemsets by their support."
    )
    epoch: Literal["training", "set"] = Field(
        "training", description="Draws an epoch: as many as the training set, or the selected set, has graphs."
    )
    network: NetworkSpec = Field(default_factory=NetworkSpec)
    train: TrainSpec = Field(
        default_factory=lambda: TrainSpec(
            epochs=30,
            batch_size=32,
            optimizer=OptimizerSpec(name="adam", lr=1e-3, weight_decay=1e-4),
            best="auc",
            log_every=50,
        )
    )
    runs: int = Field(3, ge=1, description="Networks of each kind, from different weights.")
    keep: int = Field(2, ge=1, description="Report the mean of so many, the best by validation.")

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if (self.support is None) == (self.budget is None):
            raise ValueError("give exactly one of support and budget")
        if self.keep > self.runs:
            raise ValueError(f"keep ({self.keep}) cannot be more than runs ({self.runs})")
        return self

    @property
    def options(self) -> Options:
        return Options(
            self.hops, self.shared == "keep", self.single == "keep", self.longest, self.most, self.largest_tree
        )


@dataclass
class GraphSet(Product):
    """A small set of graphs to train on, with the labels it is written in.

    Attributes:
        graphs: their labels are positions in the vocabularies; distilled ones have `roots` and `weight`.
        vocabulary, edge_vocabulary: sorted labels of the data set's training graphs; others are unknown.
        hops: how deep a network it serves; classes: C.
        sampling: how its graphs are drawn.
        draws: draws of an epoch.
    """

    kind: ClassVar[str] = "stillhouse.methods.graphs.mirage:GraphSet"
    graphs: Graphs
    vocabulary: Tensor
    edge_vocabulary: Tensor
    hops: int
    classes: int
    sampling: Literal["uniform", "frequency"]
    draws: int
    figures: dict[str, float] = field(default_factory=dict)

    def network(self, kind: Kind, spec: NetworkSpec | None = None) -> GraphNetwork:
        """A fresh network for these labels and classes."""
        s = spec or NetworkSpec()
        options: dict[str, Any] = {
            "width": s.width,
            "dropout": s.dropout,
            "pooling": s.pooling,
            "norm": s.norm,
            "layers": s.layers or self.hops,
        }
        return GraphNetwork(kind, len(self.vocabulary), len(self.edge_vocabulary), self.classes, **options)

    def read(self, graphs: Graphs) -> Graphs:
        """Graphs with labels as in the data set, in the labels of this one; labels that it has not become the
        unknown."""
        return mapped(graphs, self.vocabulary, self.edge_vocabulary)

    def to_pyg(self) -> list[Any]:
        """A list of torch_geometric `Data`, with `roots` and `weight` where it is distilled (needs the extra
        `graph`)."""
        return self.graphs.to_pyg()

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"vocabulary": self.vocabulary, "edge_vocabulary": self.edge_vocabulary, **_small(self.graphs)}
        save_file({k: v.contiguous() for k, v in tensors.items()}, str(folder / "graphs.safetensors"))
        meta = {
            "hops": self.hops,
            "classes": self.classes,
            "sampling": self.sampling,
            "draws": self.draws,
            "graphs": len(self.graphs),
        }
        (folder / "product.json").write_text(json.dumps({"kind": self.kind, "format": 1, **meta}, indent=1))

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> GraphSet:
        from safetensors.torch import load_file

        meta, tensors = read_meta(folder), load_file(str(Path(folder) / "graphs.safetensors"))
        vocabulary, edge_vocabulary = tensors.pop("vocabulary"), tensors.pop("edge_vocabulary")
        return cls(
            _graphs(tensors),
            vocabulary,
            edge_vocabulary,
            meta["hops"],
            meta["classes"],
            meta["sampling"],
            meta["draws"],
        )


class Mirage(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        graphs, split = load_graphs(config.data, run.data_root, config.seed)
        train = graphs.select(split["train"])
        for part, rows in split.items():
            if len(torch.unique(graphs.y[rows])) < graphs.num_classes:
                raise UserError(
                    f"mirage: the {part} part of {config.data.name} ({len(rows)} graphs) lacks a class; choose "
                    "another data.split."
                )
        size = f"a share {config.budget:g} of the nodes" if config.budget else f"supports {config.support}"
        does = f"mine {len(train)} graphs ({train.num_nodes} nodes) for sets of {config.hops}-hop trees, {size}"
        stages = [] if config.select == "all" else [Stage("distil", does)]
        kinds = ", ".join(config.network.kinds)
        return [
            *stages,
            Stage(
                "network",
                f"train {config.runs} networks of each kind ({kinds}) on the set of '{config.select}', and test them",
            ),
        ]

    def run(self, config: Config, run: Run) -> GraphSet:
        graphs, split = load_graphs(config.data, run.data_root, config.seed)
        raw = graphs.select(split["train"])
        vocabulary, edge_vocabulary = torch.unique(raw.labels), torch.unique(raw.edge_labels)
        train = mapped(raw, vocabulary, edge_vocabulary)
        figures: dict[str, float] = {}
        chosen, draws = train, len(train)
        if config.select != "all":
            made = run.stage(
                "distil", lambda: self._distil(config, train), {**_choice(config), "data": train.fingerprint}
            )
            draw_skew(run.folder, {config.data.name: (made["skew"]["share"], made["skew"]["covered"])}, config.hops)
            chosen, figures = _graphs(made["graphs"]), dict(made["figures"])
            if config.select == "random":
                chosen = train.select(random_graphs(train, chosen.num_nodes, config.seed))
            elif config.select == "herding":
                from stillhouse.methods.graphs.mirage.trees import TreeClasses

                chosen = train.select(herded_graphs(train, chosen.num_nodes, TreeClasses(train, config.hops)))
        figures |= {
            "graphs": float(len(chosen)),
            "nodes": float(chosen.num_nodes),
            "node_share": chosen.num_nodes / train.num_nodes,
            "number_share": chosen.numbers / train.numbers,
        }
        sampling = config.sampling if config.select == "mirage" else "uniform"
        draws = draws if config.epoch == "training" else len(chosen)
        return GraphSet(chosen, vocabulary, edge_vocabulary, config.hops, graphs.num_classes, sampling, draws, figures)

    @staticmethod
    def _distil(config: Config, train: Graphs) -> dict[str, Any]:
        made = distil(train, support=config.support, budget=config.budget, options=config.options)
        share, covered = skew(made.trees.counts)
        figures = {
            "distil_seconds": made.seconds,
            "tree_seconds": made.tree_seconds,
            "tree_classes": float(len(made.trees)),
            "truncated": float(made.truncated),
            **{f"patterns_class{c}": float((made.graphs.y == c).sum()) for c in made.thresholds},
            **{f"support_class{c}": float(s) for c, s in made.thresholds.items()},
        }
        return {
            "graphs": _small(made.graphs),
            "figures": figures,
            "skew": {"share": share.tolist(), "covered": covered.tolist()},
        }


@evaluates(GraphSet.kind)
def judge(product: GraphSet, run: Run) -> dict[str, float]:
    """Networks of each kind trained on the set and tested on ordinary graphs: `auc`, `accuracy`, and by kind `auc_gin`,
    ..., of the best by validation."""
    config: Config = run.config  # type: ignore[assignment]
    graphs, split = load_graphs(config.data, run.data_root, config.seed)
    parts = {name: product.read(graphs.select(split[name])) for name in ("val", "test")}
    uses = {
        "set": product.graphs.fingerprint,
        "draws": product.draws,
        "sampling": product.sampling,
        "train": config.train.model_dump(mode="json"),
    }
    figures: dict[str, float] = {}
    for kind in config.network.kinds:
        tried = []
        for number in range(config.runs):

            def make(kind: Kind = kind, number: int = number) -> dict[str, float]:
                with keyed("model", kind, number, config.seed):
                    network = product.network(kind, config.network)
                return trained(
                    network,
                    product.graphs,
                    parts,
                    config.train,
                    run,
                    f"{kind}{number}",
                    product.draws,
                    product.sampling,
                )

            made = {
                **uses,
                "kind": kind,
                "number": number,
                "seed": config.seed,
                "network": config.network.model_dump(mode="json"),
            }
            tried.append(run.stage(f"network.{kind}{number}", make, made, shared=False))
        best = sorted(tried, key=lambda t: -t["val_auc"])[: config.keep]
        for name in ("auc", "accuracy", "val_auc", "epoch_seconds"):
            figures[f"{name}_{kind}"] = sum(t[name] for t in best) / len(best)
    for name in ("auc", "accuracy", "epoch_seconds"):
        figures[name] = sum(figures[f"{name}_{k}"] for k in config.network.kinds) / len(config.network.kinds)
    return figures


def draw_skew(folder: Path, curves: dict[str, tuple[list[float], list[float]]], hops: int) -> Path:
    """`trees.html` in a folder: the share of nodes that the most frequent share of trees covers, a curve a data set."""
    from stillhouse.reporting.figures import lines
    from stillhouse.reporting.page import figure, page, section, write

    plot = lines(curves, "share of distinct trees, most frequent first", "share of nodes covered")
    words = (
        "How skewed the computation trees are: a curve that rises at once means that few trees make up most of the "
        "data."
    )
    body = section("Skew of trees", words, figure(plot, "skew", words))
    return write(folder / "trees.html", page(f"{hops}-hop computation trees", ", ".join(curves), [body]))


def _choice(config: Config) -> dict[str, Any]:
    return config.model_dump(
        mode="json", include={"hops", "support", "budget", "shared", "single", "longest", "most", "largest_tree"}
    )


def _small(graphs: Graphs) -> dict[str, Tensor]:
    """The tensors of a set, integers in 32 bits."""
    tensors = {
        "labels": graphs.labels,
        "edges": graphs.edges,
        "edge_labels": graphs.edge_labels,
        "nodes": graphs.nodes,
        "y": graphs.y,
    }
    rest = {"roots": graphs.roots, "weight": graphs.weight}
    return {**{k: v.to(torch.int32) for k, v in tensors.items()}, **{k: v for k, v in rest.items() if v is not None}}


def _graphs(tensors: dict[str, Tensor]) -> Graphs:
    return Graphs(**{k: v.to(torch.int64) if v.dtype == torch.int32 else v for k, v in tensors.items()})
