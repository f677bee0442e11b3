"""GLNN: a perceptron on node features learns the soft labels of a graph network, and needs no graph when it predicts.

paper: Graph-less Neural Networks: Teaching Old MLPs New Tricks via Distillation
venue: ICLR 2022
arxiv: 2110.08727
task: node classification
family: GNN-to-MLP distillation
use when: a graph network is accurate but fetching a node's neighbours at prediction time is too slow
needs: node features, edges at training time, labels of a few nodes, validation labels

L = lamb CE(train nodes) + (1 - lamb) mean_i KL(teacher_i || student_i), temperature 1, over all nodes that training sees; full batches, while the
released code takes batches of nodes. `lamb: 1` is the plain MLP. With `data.hide` a share of the test nodes, edges and all, is not there until the
test. Nodes with label -1 are distilled but never scored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from stillhouse.data.node_graphs import NodeGraph
from stillhouse.evaluation import cost
from stillhouse.functional import checks
from stillhouse.functional.precision import full_precision
from stillhouse.methods.graphs.glnn.training import Loss, NodeConfig, NodeTrain, TeacherGNN, fit_nodes, graph_of, new_student, taught, test_figures
from stillhouse.models.graph import NodeMLP
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, evaluating
from stillhouse.tasks.nodes import Nodes


@full_precision
def soft_label_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) of logits (N, C) at temperature 1, mean over nodes: a scalar.

    Raises:
        UserError: shapes that do not fit.
    """
    checks.same_classes("glnn", student_logits, teacher_logits)
    return F.kl_div(F.log_softmax(student_logits, -1), F.log_softmax(teacher_logits, -1), reduction="batchmean", log_target=True)


class Config(NodeConfig):
    teacher: TeacherGNN = Field(default_factory=TeacherGNN)
    train: NodeTrain = Field(default_factory=NodeTrain, description="How the student is trained.")
    lamb: float = Field(0.0, ge=0, le=1, description="Weight of the labels; the distillation terms have 1 - lamb. 1 is the plain MLP.")


class NodeStudent(Student):
    """A perceptron that takes node features (B, D), dense or CSR, and gives logits (B, C)."""

    kind: ClassVar[str] = "stillhouse.methods.graphs.glnn:NodeStudent"


@evaluates(NodeStudent.kind)
def judge(product: NodeStudent, run: Run) -> dict[str, float]:
    """Accuracy on the test nodes, of which those that training did not see also alone, and what the student costs for one node."""
    assert isinstance(run.config, NodeConfig)
    graph = graph_of(run.config, run)
    with evaluating(product.module):
        out = test_figures(product.module(graph.x), graph)
    example = {"input": graph.rows(graph.split["test"][:1]).to_dense()}
    out |= {"parameters": cost.parameters(product.module), "multiply_adds": cost.multiply_adds(product.module, example)}
    return {**out, "latency_ms": cost.latency(product.module, example)["median"]}


def node_student(module: NodeMLP, config: NodeConfig, graph: NodeGraph, figures: dict[str, float]) -> NodeStudent:
    """A trained perceptron as the product of a run."""
    task = Nodes(tuple(str(c) for c in range(graph.num_classes)), graph.num_features)
    return NodeStudent(module, config.student.spec, task, figures)


class GraphLess(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        t, s = config.teacher, config.student
        return [
            Stage("teacher", "train the graph network with cross-entropy (kept, shared)", {"teacher": f"{t.conv}, {t.layers} x {t.width}"}),
            Stage("student", self.does(config), {"student": f"MLP, {s.layers} x {s.width}"}, steps=config.train.epochs),
        ]

    def run(self, config: Config, run: Run) -> NodeStudent:
        graph = graph_of(config, run)
        teacher = taught(run, config.teacher, graph)
        seen = graph.observed()
        student = new_student(config.student, graph, run)
        loss = distil(config.lamb, seen, lambda logits: {"soft": soft_label_loss(logits, teacher.logits)})
        figures = fit_nodes(run, "student", student, loss, lambda m: m(seen.x), seen, config.train)
        return node_student(student, config, graph, {**teacher.figures, **figures})

    def does(self, config: Config) -> str:
        return "train the MLP on the labels alone" if config.lamb == 1 else "distil the graph network's soft labels into the MLP"


def distil(lamb: float, seen: NodeGraph, terms: Callable[[Tensor], dict[str, Tensor]]) -> Loss:
    """lamb CE(train nodes) + (1 - lamb) sum of `terms(logits)`, full batch; a weight of 0 leaves its part out."""
    train, labels = seen.split["train"], seen.labels[seen.split["train"]]

    def loss(student: NodeMLP, batch: Batch) -> dict[str, Tensor]:
        logits = student(seen.x)
        out = {"ce": lamb * F.cross_entropy(logits[train].float(), labels)} if lamb else {}
        return out if lamb == 1 else {**out, **{k: (1 - lamb) * v for k, v in terms(logits).items()}}

    return loss


__all__ = ["Config", "GraphLess", "NodeStudent", "distil", "node_student", "soft_label_loss"]
