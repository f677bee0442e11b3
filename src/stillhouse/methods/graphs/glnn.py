"""GLNN: a perceptron on node features learns the soft labels of a graph network, and needs no graph when it predicts.

paper: Graph-less Neural Networks: Teaching Old MLPs New Tricks via Distillation
venue: ICLR 2022
arxiv: 2110.08727
task: node classification
family: GNN-to-MLP distillation
use when: a graph network is accurate but fetching a node's neighbours at prediction time is too slow
needs: node features, edges at training time, labels of a few nodes, validation labels

L = lamb CE(train nodes) + (1 - lamb) mean_i KL(teacher_i || student_i), temperature 1, over all nodes that training
sees; full batches, while the released code takes batches of nodes. `lamb: 1` is the plain MLP. With `data.hide` a share
of the test nodes, edges and all, is not there until the test. Nodes with label -1 are distilled but never scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import LRSchedule, MethodConfig, ModelSpec, OptimizerSpec, Spec, TrainSpec
from stillhouse.data import BatchKey, Loader
from stillhouse.data.node_graphs import GraphSpec, NodeBundle, NodeGraph
from stillhouse.distillation.objective import Progress
from stillhouse.functional import checks
from stillhouse.functional.precision import full_precision
from stillhouse.models.graph import GNN, Conv, NodeMLP
from stillhouse.randomness import keyed
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, evaluating
from stillhouse.tasks.nodes import Nodes
from stillhouse.training.module import TrainingModule

Loss = Callable[[Any, Batch], dict[str, Tensor]]


@full_precision
def soft_label_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) of logits (N, C) at temperature 1, mean over nodes: a scalar.

    Raises:
        UserError: shapes that do not fit.
    """
    checks.same_classes("glnn", student_logits, teacher_logits)
    return F.kl_div(
        F.log_softmax(student_logits, -1), F.log_softmax(teacher_logits, -1), reduction="batchmean", log_target=True
    )


def distil(lamb: float, seen: NodeGraph, terms: Callable[[Tensor], dict[str, Tensor]]) -> Loss:
    """lamb CE(train nodes) + (1 - lamb) sum of `terms(logits)`, full batch; a weight of 0 leaves its part out."""
    train, labels = seen.split["train"], seen.labels[seen.split["train"]]

    def loss(student: NodeMLP, batch: Batch) -> dict[str, Tensor]:
        logits = student(seen.x)
        out = {"ce": lamb * F.cross_entropy(logits[train].float(), labels)} if lamb else {}
        return out if lamb == 1 else {**out, **{k: (1 - lamb) * v for k, v in terms(logits).items()}}

    return loss


class NodeTrain(TrainSpec):
    """How a network is fitted to nodes; each step sees the whole graph."""

    epochs: int = Field(500, ge=1, description="Steps, at most.")
    batch_size: Literal[0] = Field(0, description="Not to be set: a step sees the whole graph.")
    optimizer: OptimizerSpec = Field(
        default_factory=lambda: OptimizerSpec(name="adam", lr=0.01, weight_decay=5e-4), description="Default: Adam."
    )
    schedule: LRSchedule = Field(default_factory=lambda: LRSchedule(name="constant"), description="Default: constant.")
    best: Literal["accuracy"] | None = Field(
        "accuracy", description="Keep the weights of the best validation accuracy; of equals, the last."
    )
    patience: int | None = Field(50, ge=1, description="Stop after so many epochs that were below the best.")


class TeacherGNN(Spec):
    """The graph network that teaches."""

    conv: Conv = Field("gcn", description="gcn, sage or gat.")
    layers: int = Field(2, ge=1)
    width: int = Field(128, ge=1, description="Of a hidden layer, all heads together.")
    dropout: float = Field(0.5, ge=0, lt=1)
    heads: int = Field(4, ge=1, description="gat: attention heads of a hidden layer.")
    seed: int | None = Field(None, description="Of the teacher's training; default: the run's.")
    train: NodeTrain = Field(default_factory=NodeTrain)


class StudentMLP(Spec):
    """The perceptron that learns to do without the graph."""

    layers: int = Field(2, ge=1)
    width: int = Field(128, ge=1)
    dropout: float = Field(0.5, ge=0, lt=1)

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(model="stillhouse:node_mlp", options=self.model_dump())


class NodeConfig(MethodConfig):
    """What recipes on node graphs have in common."""

    data: GraphSpec
    student: StudentMLP = Field(default_factory=StudentMLP)


@dataclass(frozen=True)
class TrainedTeacher:
    """A trained graph network and its outputs.

    Attributes:
        logits: (n, C), of the nodes seen in training, from the graph seen in training.
        figures: `teacher_accuracy` on all test nodes with the whole graph (and on observed and hidden ones),
            `teacher_seconds`.
    """

    network: GNN
    logits: Tensor
    figures: dict[str, float]


def graph_of(config: NodeConfig, run: Run) -> NodeGraph:
    """The recipe's graph with the run's split, on the run's device."""
    bundle: NodeBundle = run.data(config.data, Nodes)
    return bundle.graph.to(run.device)


class NodeFit(TrainingModule):
    """A network and its loss as what `run.fit` trains; it remembers the best test accuracy of any epoch, which is
    reported and chooses nothing."""

    top_test: Tensor

    def __init__(self, network: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.student, self._loss, self.epoch = network, loss, 0
        self.register_buffer("top_test", torch.zeros((), dtype=torch.float64))

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        self.epoch = progress.epoch
        terms = self._loss(self.student, batch)
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}


class Positions:
    """A data set of node ids, for `Loader`."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def labels(self) -> Tensor:
        return torch.zeros(self._count, dtype=torch.long)

    def batch(self, key: BatchKey, seed: int) -> Batch:
        return {"index": torch.from_numpy(key.indices[key.start : key.stop])}


def fit_nodes(
    run: Run,
    stage: str,
    network: nn.Module,
    loss: Loss,
    predict: Callable[[Any], Tensor],
    graph: NodeGraph,
    train: TrainSpec,
    further: Callable[[Tensor], Mapping[str, float]] | None = None,
    seed: int | None = None,
) -> dict[str, float]:
    """Fit a network to nodes and leave the weights of its best validation accuracy in it (of equals, the last).

    Args:
        loss: (network, batch) -> named terms, whose sum is the loss; a batch's `index` (B,) holds node ids where
            `train.batch_size` is set.
        predict: network -> logits (n, C) of the graph's nodes; in evaluation mode.
        further: logits -> more figures of an epoch, written to metrics.csv.

    Returns:
        `val_accuracy`, `test_selected` (the best test accuracy of any epoch: what choosing by the test would report),
        `epochs`, `seconds`, and the further figures of the chosen epoch.
    """
    module = NodeFit(network, loss)
    size = train.batch_size or 1
    loader = Loader(
        Positions(graph.num_nodes if train.batch_size else 1),
        min(size, graph.num_nodes),
        seed=run.seed,
        shuffle=True,
        drop_last=True,
    )

    def judged(model: nn.Module, device: torch.device) -> dict[str, float]:
        with evaluating(model):
            logits = predict(model)
        val, test = (accuracy(logits, graph, graph.split[s]) for s in ("val", "test"))
        module.top_test.fill_(max(module.top_test.item(), test))
        return {
            "accuracy": val,
            "score": val + 1e-9 * module.epoch,
            "test_accuracy": test,
            **(further(logits) if further else {}),
        }

    spec = train.model_copy(update={"best": "score" if train.best else None})
    with run.seeded(run.seed if seed is None else seed):
        fitted = run.fit(stage, module, loader, spec, evaluate=judged)
    further_figures = {k: v for k, v in fitted.figures.items() if k not in ("accuracy", "score", "test_accuracy")}
    figures = {
        "val_accuracy": fitted.figures["accuracy"],
        "test_selected": module.top_test.item(),
        "epochs": float(fitted.epochs),
    }
    return {**figures, "seconds": fitted.seconds, **further_figures}


def accuracy(logits: Tensor, graph: NodeGraph, nodes: Tensor) -> float:
    """Share of the nodes (n,) whose most probable class, by logits (N, C), is theirs; NaN of none."""
    return (logits[nodes].argmax(-1) == graph.labels[nodes]).double().mean().item()


def test_figures(logits: Tensor, graph: NodeGraph, prefix: str = "") -> dict[str, float]:
    """`accuracy` on all test nodes; where some were hidden from training, also on those (`accuracy_hidden`) and on the
    others (`accuracy_observed`)."""
    out = {f"{prefix}accuracy": accuracy(logits, graph, graph.split["test"])}
    if len(graph.hidden):
        others = graph.split["test"][~torch.isin(graph.split["test"], graph.hidden)]
        out |= {
            f"{prefix}accuracy_hidden": accuracy(logits, graph, graph.hidden),
            f"{prefix}accuracy_observed": accuracy(logits, graph, others),
        }
    return out


def trained_teacher(run: Run, spec: TeacherGNN, graph: NodeGraph) -> TrainedTeacher:
    """The graph network of a spec, trained with cross-entropy on the observed graph: the stage `teacher`, shared by all
    recipes with the same one."""
    seen = graph.observed()
    seed = run.seed if spec.seed is None else spec.seed
    with keyed("model", "teacher", seed):
        network = GNN(
            spec.conv, graph.num_features, spec.width, graph.num_classes, spec.layers, spec.dropout, spec.heads
        ).to(run.device)
    along = network.propagation(seen.edges, seen.num_nodes)
    train, labels = seen.split["train"], seen.labels[seen.split["train"]]

    def make() -> dict[str, Any]:
        def loss(model: GNN, batch: Batch) -> dict[str, Tensor]:
            return {"ce": F.cross_entropy(model(seen.x, along)[train], labels)}

        figures = fit_nodes(run, "teacher", network, loss, lambda m: m(seen.x, along), seen, spec.train, seed=seed)
        return {"weights": state_on_cpu(network), "figures": figures}

    uses = {"teacher": described(spec, spec.train), "graph": seen.fingerprint, "seed": seed}
    stored = run.stage("teacher", make, uses)
    network.load_state_dict(stored["weights"])
    with evaluating(network):
        logits = network(seen.x, along)
        whole = network(graph.x, network.propagation(graph.edges, graph.num_nodes)) if len(graph.hidden) else logits
    figures = test_figures(whole, graph, "teacher_")
    return TrainedTeacher(network, logits, {**figures, "teacher_seconds": stored["figures"]["seconds"]})


def described(spec: Spec, train: TrainSpec) -> dict[str, Any]:
    """What a trained network depends on, of its spec."""
    out = spec.model_dump(mode="json", exclude={"seed", "train"})
    return {**out, "train": train.identity()}


def new_student(spec: StudentMLP, graph: NodeGraph, run: Run) -> NodeMLP:
    """The student, initialised by the run's seed."""
    with keyed("model", "student", run.seed):
        return NodeMLP(**spec.model_dump(), num_classes=graph.num_classes, input_shape=(graph.num_features,)).to(
            run.device
        )


class Config(NodeConfig):
    teacher: TeacherGNN = Field(default_factory=TeacherGNN)
    train: NodeTrain = Field(default_factory=NodeTrain, description="How the student is trained.")
    lamb: float = Field(
        0.0, ge=0, le=1, description="Weight of the labels; the distillation terms have 1 - lamb. 1 is the plain MLP."
    )


def node_student(module: NodeMLP, config: NodeConfig, graph: NodeGraph, figures: dict[str, float]) -> Student:
    """A trained perceptron as the product of a run."""
    return Student(module, config.student.spec, NodeBundle(graph).task, figures)


class GraphLess(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        t, s = config.teacher, config.student
        return [
            Stage(
                "teacher",
                "train the graph network with cross-entropy (stored, shared)",
                {"teacher": f"{t.conv}, {t.layers} x {t.width}"},
            ),
            Stage("student", self.does(config), {"student": f"MLP, {s.layers} x {s.width}"}, steps=config.train.epochs),
        ]

    def run(self, config: Config, run: Run) -> Student:
        graph = graph_of(config, run)
        teacher = trained_teacher(run, config.teacher, graph)
        seen = graph.observed()
        student = new_student(config.student, graph, run)
        loss = distil(config.lamb, seen, lambda logits: {"soft": soft_label_loss(logits, teacher.logits)})
        figures = fit_nodes(run, "student", student, loss, lambda m: m(seen.x), seen, config.train)
        return node_student(student, config, graph, {**teacher.figures, **figures})

    def does(self, config: Config) -> str:
        return (
            "train the MLP on the labels alone"
            if config.lamb == 1
            else "distil the graph network's soft labels into the MLP"
        )
