"""FF-G2M: a perceptron learns a graph network's predictions for a node's neighbours, and how they differ along edges.

paper: Extracting Low-/High-Frequency Knowledge from Graph Neural Networks and Injecting it into MLPs: An Effective
GNN-to-MLP Distillation Framework
venue: AAAI 2023
arxiv: 2305.10758
task: node classification
family: GNN-to-MLP distillation
use when: a graph network is accurate but the graph is not there, or too slow to read, at prediction time
needs: node features, edges at training time, labels of a few nodes, validation labels

L = lamb CE + (1 - lamb) (LFD + HFD). LFD, low frequency: KL(teacher at j || student at i), mean over directed edges and
self loops. HFD, high frequency: KL between softmax(|difference of logits| / tau) of teacher and student, mean over
edges, no tau^2. `terms` gives the ablations: [low], [high], [soft] (GLNN), and `lamb: 1` the plain MLP. LFD is computed
as a cross-entropy to the sum of the neighbours' predictions, which has the value and gradient of the sum over edges.
The paper's kernel of a difference is the absolute value, as in the released code. That code swaps the names of the two
dropouts: here `teacher.dropout` is the teacher's. The weights of the best validation epoch are kept; the code keeps the
last and reports the best epoch's score. `edges_per_step` draws edges for HFD (not in the paper; an unbiased mean for
graphs whose edges do not fit). `drowning.html`, of `drowning: true`, shows by epoch what the paper calls information
drowning, for students of each ablation under the same teacher.
"""

from __future__ import annotations

import csv
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from stillhouse.data.node_graphs import NodeGraph
from stillhouse.errors import UserError
from stillhouse.functional import checks
from stillhouse.functional.precision import full_precision
from stillhouse.methods.graphs import glnn
from stillhouse.methods.graphs.glnn import (
    TrainedTeacher,
    fit_nodes,
    graph_of,
    new_student,
    test_figures,
    trained_teacher,
)
from stillhouse.models.graph import NodeMLP
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run

Term = Literal["low", "high", "soft"]
ABLATIONS: dict[str, list[Term]] = {"GLNN": ["soft"], "LFD": ["low"], "HFD": ["high"], "FF-G2M": ["low", "high"]}


@dataclass(frozen=True)
class LowFrequency:
    """The target of each node: the teacher's predictions summed over its neighbours and itself.

    Attributes:
        received: (N, C), sum of the teacher's probabilities at i and its neighbours.
        offset: scalar, sum over directed edges (self loops too) of the negative entropy of the edge's teacher
            prediction.
        count: |E1|, directed edges and self loops.
    """

    received: Tensor
    offset: Tensor
    count: int

    @classmethod
    def of(cls, teacher_logits: Tensor, edges: Tensor) -> LowFrequency:
        """From logits (N, C) and edges (2, E), both directions, without self loops."""
        check_edges(edges, len(teacher_logits))
        log_p = F.log_softmax(teacher_logits.float(), -1)
        p = log_p.exp()
        received = p.index_add(0, edges[0], p[edges[1]])
        degree = torch.bincount(edges[1], minlength=len(p)) + 1
        return cls(received, (degree * (p * log_p).sum(-1)).sum(), edges.shape[1] + len(p))

    @full_precision
    def loss(self, student_logits: Tensor) -> Tensor:
        """The low-frequency loss of logits (N, C): a scalar."""
        return (self.offset - (self.received * F.log_softmax(student_logits, -1)).sum()) / self.count


def low_frequency_loss(student_logits: Tensor, teacher_logits: Tensor, edges: Tensor) -> Tensor:
    """KL(teacher at j || student at i), mean over directed edges (i, j) and a self loop of every node; logits (N, C),
    edges (2, E) without loops.

    Raises:
        UserError: shapes that do not fit, edges out of range.
    """
    checks.same_classes("ff_g2m", student_logits, teacher_logits)
    return LowFrequency.of(teacher_logits, edges).loss(student_logits)


@full_precision
def high_frequency_loss(student_logits: Tensor, teacher_logits: Tensor, edges: Tensor, tau: float = 1.5) -> Tensor:
    """KL(softmax(|T_i - T_j| / tau) || softmax(|S_i - S_j| / tau)), mean over edges (2, E); raw logits (N, C). 0
    without edges.

    Both directions of an edge give the same, so one of them is enough.

    Raises:
        UserError: tau not above 0, shapes that do not fit, edges out of range.
    """
    checks.options("ff_g2m", positive={"tau": tau})
    checks.same_classes("ff_g2m", student_logits, teacher_logits)
    if not edges.shape[1]:
        return student_logits.sum() * 0
    return F.kl_div(
        difference_log_probs(student_logits, edges, tau),
        difference_log_probs(teacher_logits, edges, tau),
        reduction="batchmean",
        log_target=True,
    )


@full_precision
def difference_log_probs(logits: Tensor, edges: Tensor, tau: float) -> Tensor:
    """log_softmax(|z_i - z_j| / tau) of each edge: (E, C)."""
    check_edges(edges, len(logits))
    return F.log_softmax((logits[edges[0]] - logits[edges[1]]).abs() / tau, -1)


def check_edges(edges: Tensor, nodes: int) -> None:
    """Raise `UserError` for edges that are not (2, E) node ids from 0 to N - 1; values are looked at only on the
    CPU."""
    if edges.ndim != 2 or edges.shape[0] != 2:
        raise UserError(f"ff_g2m: edges must have shape (2, E); given: {tuple(edges.shape)}.")
    if edges.device.type == "cpu" and edges.numel() and not (int(edges.min()) >= 0 and int(edges.max()) < nodes):
        raise UserError(
            f"ff_g2m: edges name nodes from {int(edges.min())} to {int(edges.max())}, but there are {nodes} (0 to "
            f"{nodes - 1})."
        )


class Config(glnn.Config):
    tau: float = Field(1.5, gt=0, description="HFD's temperature.")
    terms: list[Term] = Field(
        default_factory=lambda: list[Term](["low", "high"]),
        min_length=1,
        description="low: LFD; high: HFD; soft: GLNN's soft labels.",
    )
    edges_per_step: int | None = Field(None, ge=1, description="Edges drawn at each step for HFD; default: all.")
    drowning: bool = Field(
        False,
        description="Also train a student of each ablation and plot, by epoch, how much of both frequencies it took "
        "over.",
    )


class FFG2M(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        stages = glnn.GraphLess().plan(config, run)
        does = (
            "train the MLP on the labels alone"
            if config.lamb == 1
            else f"distil into the MLP: {', '.join(config.terms)}"
        )
        stages[-1] = Stage("student", does, stages[-1].models, steps=config.train.epochs)
        if config.drowning:
            stages.insert(
                1,
                Stage(
                    "ablation",
                    f"train students of {', '.join(ABLATIONS)} for the plot",
                    steps=len(ABLATIONS) * config.train.epochs,
                ),
            )
        return stages

    def run(self, config: Config, run: Run) -> Student:
        graph = graph_of(config, run)
        teacher = trained_teacher(run, config.teacher, graph)
        seen = graph.observed()
        if not seen.edges.shape[1] and config.lamb < 1:
            warnings.warn(
                f"ff_g2m: {graph.name} has no edges, so HFD is 0 and LFD is the soft-label loss.", stacklevel=2
            )
        figures: dict[str, float] = {}
        if config.drowning:
            for name, terms in ABLATIONS.items():
                _, made = self._student(config, run, f"ablation.{name}", terms, graph, seen, teacher)
                figures |= {f"{name}.{k}": made[k] for k in ("accuracy", "low_cosine", "high_kl")}
        student, made = self._student(config, run, "student", config.terms, graph, seen, teacher)
        if config.drowning:
            plot_drowning(run.folder, self._teacher_share(seen, teacher))
        made.pop("accuracy")
        return glnn.node_student(student, config, graph, {**teacher.figures, **made, **figures})

    def _student(
        self,
        config: Config,
        run: Run,
        stage: str,
        terms: list[Term],
        graph: NodeGraph,
        seen: NodeGraph,
        teacher: TrainedTeacher,
    ) -> tuple[NodeMLP, dict[str, float]]:
        """A student trained on some terms, and its figures, `low_cosine` and `high_kl` among them."""
        logits, low = teacher.logits, LowFrequency.of(teacher.logits, seen.edges)
        once = seen.edges[:, seen.edges[0] < seen.edges[1]]  # one direction of each edge

        def distilled(given: Tensor) -> dict[str, Tensor]:
            out = {}
            if "soft" in terms:
                out["soft"] = glnn.soft_label_loss(given, logits)
            if "low" in terms:
                out["low"] = low.loss(given)
            if "high" in terms:
                drawn = once
                if config.edges_per_step is not None and config.edges_per_step < once.shape[1]:
                    drawn = once[:, torch.randint(once.shape[1], (config.edges_per_step,)).to(once.device)]
                out["high"] = high_frequency_loss(given, logits, drawn, config.tau)
            return out

        student = new_student(config.student, graph, run)
        loss = glnn.distil(config.lamb, seen, distilled)
        figures = fit_nodes(
            run,
            stage,
            student,
            loss,
            lambda m: m(seen.x),
            seen,
            config.train,
            lambda given: frequencies(given, logits, once, low, config.tau),
        )
        with torch.no_grad():
            student.eval()
            return student, {**figures, **test_figures(student(graph.x), graph)}

    @staticmethod
    def _teacher_share(seen: NodeGraph, teacher: TrainedTeacher) -> float:
        """The teacher's own low-frequency cosine: where a student that copied it would be."""
        return cosine_to_neighbours(teacher.logits, LowFrequency.of(teacher.logits, seen.edges))


def frequencies(
    student_logits: Tensor, teacher_logits: Tensor, once: Tensor, low: LowFrequency, tau: float
) -> dict[str, float]:
    """How much of both frequencies a student took over: `low_cosine` (larger is more) and `high_kl`, the value of HFD
    (smaller is more)."""
    high = high_frequency_loss(student_logits, teacher_logits, once, tau)
    return {"low_cosine": cosine_to_neighbours(student_logits, low), "high_kl": high.item()}


def cosine_to_neighbours(logits: Tensor, low: LowFrequency) -> float:
    """Mean over nodes of the cosine between predicted probabilities and the teacher's mean over the node's
    neighbourhood."""
    return F.cosine_similarity(F.softmax(logits, -1), low.received, dim=-1).mean().item()


def plot_drowning(folder: Path, teacher_cosine: float) -> Path:
    """Write `drowning.html` from a run's metrics.csv: both figures by epoch for each ablation.

    Needs no network to be read.
    """
    from stillhouse.reporting.figures import lines
    from stillhouse.reporting.page import figure, grid, page, section, write

    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {"val/low_cosine": {}, "val/high_kl": {}}
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name = row["stage"].removeprefix("ablation.")
            if name in ABLATIONS:
                for figure_name, drawn in curves.items():
                    if row.get(figure_name):
                        xs, ys = drawn.setdefault(name, ([], []))
                        xs.append(float(row["epoch"]) + 1)
                        ys.append(float(row[figure_name]))
    last = len(max((xs for xs, _ in curves["val/low_cosine"].values()), key=len, default=[0.0]))
    curves["val/low_cosine"]["teacher itself"] = ([1.0, float(last)], [teacher_cosine] * 2)
    parts = [
        figure(
            lines(curves["val/low_cosine"], "epoch", "cosine to the teacher's neighbourhood mean"),
            "low",
            "Low frequency: higher is more alike.",
        ),
        figure(
            lines(curves["val/high_kl"], "epoch", "KL of differences along edges"),
            "high",
            "High frequency: lower is more alike.",
        ),
    ]
    text = (
        "What students of one teacher took over of its agreement with neighbours and of its differences from them, "
        "by epoch."
    )
    return write(
        folder / "drowning.html",
        page("Information drowning", str(folder.name), [section("Frequencies", text, grid(parts))]),
    )
