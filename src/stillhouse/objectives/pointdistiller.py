"""PointDistiller: both networks encode the neighbourhoods of the pillars, cells or points that matter most alike.

paper: PointDistiller: Structured Knowledge Distillation Towards Efficient and Compact 3D Detection
venue: CVPR 2023
arxiv: 2205.11098
task: point_detection
family: local graphs
use when: a detector in point clouds must have a fraction of the weights
needs: teacher and student on the same pillars, cells or points

The N most important rows are chosen: pillars by how many points they hold, cells of a map from above and points by the
teacher's largest channel. Of each, the K nearest rows in the space of the teacher's features, itself among them, make
an edge each, neighbour and centre side by side; one layer for each network (a linear map without bias, batch norm,
ReLU) encodes the edges to one width, and the squared differences of both are weighted by importance. The pillars of a
batch are pooled, so that neighbours may be of other clouds; cells and points have theirs in their own cloud. Distances
are computed some rows at a time.

The released code weighs by a softmax of whole counts at temperature 0.01, which leaves the fullest pillars alone;
of maps its softmax has one entry, so that every weight is the batch size; of points its weights are not used
(`reweight: official`). The default is what the paper means, smooth: importance relative to its largest, temperature
0.1. `form: maps` is the paper's SECOND, whose two stages of the map from above are added; `form: points` its PointRCNN,
whose encoded edges are pooled over the neighbours before they are compared. `mode: plain` is the control without
graphs: every row, through a linear layer, as it is.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.errors import UserError
from stillhouse.functional import checks
from stillhouse.functional.point_clouds import nearest_rows, rows_at
from stillhouse.functional.precision import full_precision
from stillhouse.nn.masked_norm import MaskedBatchNorm
from stillhouse.signals import Batch, Signals

Form = Literal["pillars", "maps", "points"]
Reweight = Literal["softmax", "official", "none", "norm"]
LAYERS = {"pillars": ["encoder"], "maps": ["backbone.stages.0", "backbone.stages.1"], "points": ["neck"]}
"""Usual taps of our detectors."""
COUNTS = "encoder.counts"
WATCHED = 64  # queries whose neighbours are also looked for in the student


class EdgeEncoder(nn.Module):
    """One layer on edges, a linear map of (neighbour, centre) without bias, batch norm and ReLU (DGCNN's edge
    features). The map is applied to rows before they are gathered, which gives the same numbers at 1 / K of the work.

    Args:
        channels: C of the rows.
        width: Co.
        edge: concat: neighbour, then centre; sub: centre - neighbour, then centre.
    """

    def __init__(self, channels: int, width: int, edge: str = "concat") -> None:
        super().__init__()
        self.edge = edge
        self.linear = nn.Linear(2 * channels, width, bias=False)
        self.norm = MaskedBatchNorm(width)

    def forward(self, rows: Tensor, centres: Tensor, neighbours: Tensor, mask: Tensor | None = None) -> Tensor:
        """(G, N, K, Co) of rows (G, n, C), centres (G, N) and neighbours (G, N, K), both indices; `mask` (G, N, K): the
        edges that are there."""
        of_neighbour, of_centre = self.linear.weight.chunk(2, dim=1)
        if self.edge == "sub":
            of_neighbour, of_centre = -of_neighbour, of_centre + of_neighbour
        from_neighbours = rows_at(F.linear(rows, of_neighbour), neighbours)
        edges = from_neighbours + F.linear(rows_at(rows, centres), of_centre)[:, :, None]
        out: Tensor = self.norm(edges, mask).relu()
        return out


@dataclass
class Rows:
    """Rows of both networks, pillars, cells or points, in groups whose rows may be neighbours.

    Attributes:
        student, teacher: (G, n, C) of each.
        importance: (G, n).
        there: (G, n) which rows are real; the others pad a cloud or are empty.
    """

    student: Tensor
    teacher: Tensor
    importance: Tensor
    there: Tensor


def graph_of(rows: Rows, queries: int, neighbours: int, select: str = "top") -> tuple[Tensor, Tensor]:
    """The rows that are queried (G, N), the most important ("top") or any ("random"), and of each its nearest (G, N, K)
    in the teacher's features."""
    number = rows.importance.shape[1]
    order = torch.rand_like(rows.importance) if select == "random" else rows.importance
    chosen = order.masked_fill(~rows.there, -torch.inf).topk(min(queries, number), dim=1).indices
    near = nearest_rows(rows_at(rows.teacher, chosen), rows.teacher, min(neighbours, number), rows.there)
    return chosen, near


def query_weights(importance: Tensor, temperature: float, reweight: str, valid: Tensor) -> Tensor:
    """(G, N) weights of queries of this importance, whose mean over the valid ones is 1, float32; 0 for the others.

    Args:
        importance: (G, N).
        reweight: softmax: relative to the largest, at the temperature; official: as it is; else all alike.
        valid: (G, N) which queries there are.
    """
    importance, number = importance.float(), valid.sum(1, keepdim=True)
    if reweight == "softmax":
        importance = importance / importance.amax(1, keepdim=True).clamp_min(1e-12)
    elif reweight != "official":
        importance = torch.zeros_like(importance)
    scores = (importance / temperature).masked_fill(~valid, -torch.inf)
    return torch.where(number > 0, number * scores.softmax(1).nan_to_num(0.0), 0)


def plain_rows(student: Tensor, teacher: Tensor, padded: bool) -> Rows:
    """Rows (G, n, C), as important as the teacher's largest channel; `padded`: rows of nothing but zeros are none."""
    there = (teacher != 0).any(-1) if padded else torch.ones_like(teacher[..., 0], dtype=torch.bool)
    return Rows(student, teacher, teacher.amax(-1), there)


@full_precision
def graph_loss(
    student: Tensor, teacher: Tensor, weights: Tensor, valid: Tensor, reweight: str, factor: float
) -> Tensor:
    """The weighted mean square of the difference of encoded edges (G, N, K, Co), or of pooled ones (G, N, Co), of the
    valid queries (G, N); with "norm", the Frobenius norm of all, unweighted. Times the factor."""
    there = valid.reshape(*valid.shape, *(1,) * (student.ndim - 2)).to(student.dtype)
    if reweight == "norm":
        return factor * ((teacher - student) * there).square().sum().clamp_min(1e-24).sqrt()
    gap = (teacher - student).square().flatten(2).mean(2)
    return factor * (gap * weights * valid).sum() / valid.sum().clamp_min(1)


class PointDistiller(Objective):
    """Local graph distillation.

    Args:
        form: pillars: rows (B, P, C) with the counts of their points; maps: (B, C, H, W) from above; points: (B, C, N).
        student_layers, teacher_layers: the taps; default: those of our detectors.
        queries: N, how many rows are chosen; of pillars in a batch, else in a cloud.
        neighbours: K of each.
        width: Co of the encoded edges; default: the student's channels.
        reweight: softmax; official: what the released code does; none: all queries alike; norm: its unweighted mode.
        temperature: of the softmax.
        select: top: the most important rows; random: any.
        edge: concat: neighbour and centre; sub: centre - neighbour and centre.
        factor: of the loss.
        freeze: epochs after which the teacher's encoder learns no more, so that both cannot become one constant; null:
            it learns to the end, as published.
        mode: plain: the mean square over all rows, through a linear layer of the student, without graphs.
    """

    name = "pointdistiller"

    def __init__(
        self,
        form: Form = "pillars",
        student_layers: list[str] | None = None,
        teacher_layers: list[str] | None = None,
        queries: int = 300,
        neighbours: int = 16,
        width: int | None = None,
        reweight: Reweight = "softmax",
        temperature: float = 0.1,
        select: Literal["top", "random"] = "top",
        edge: Literal["concat", "sub"] = "concat",
        factor: float = 2.0,
        freeze: float | None = None,
        mode: Literal["graph", "plain"] = "graph",
    ) -> None:
        super().__init__()
        checks.options(
            "pointdistiller",
            positive={"queries": queries, "neighbours": neighbours, "temperature": temperature, "width": width or 1},
            non_negative={"factor": factor},
        )
        self.student_layers, self.teacher_layers = student_layers or LAYERS[form], teacher_layers or LAYERS[form]
        checks.same_layers("pointdistiller", self.student_layers, self.teacher_layers)
        self.form, self.queries, self.neighbours, self.width = form, queries, neighbours, width
        self.reweight, self.temperature, self.select, self.edge = reweight, temperature, select, edge
        self.factor, self.freeze, self.mode = factor, freeze, mode
        taps = {f"student.tap:{n}" for n in self.student_layers} | {f"teacher.tap:{n}" for n in self.teacher_layers}
        counts = {f"{side}.tap:{COUNTS}" for side in ("student", "teacher")} if form == "pillars" else set()
        self.needs = frozenset(taps | counts)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(3))  # of the last step: effective queries, agreement, spread

    def rows(self, student: Signals, teacher: Signals, layer: int) -> Rows:
        """The rows of one of the layers. Raises `UserError` where student and teacher have other rows."""
        ours = student.require(f"tap:{self.student_layers[layer]}")
        theirs = teacher.require(f"tap:{self.teacher_layers[layer]}").detach()
        if self.form == "pillars":
            checks.same_rows("pointdistiller", ours, theirs)
            counts = teacher.require(f"tap:{COUNTS}").to(theirs.dtype)
            counts = counts.flatten()[None]
            return Rows(ours.flatten(0, 1)[None], theirs.flatten(0, 1)[None], counts, counts > 0)
        if ours.shape[2:] != theirs.shape[2:] or len(ours) != len(theirs):
            raise UserError(
                f"pointdistiller: the student's '{self.student_layers[layer]}' is {tuple(ours.shape)} but the "
                f"teacher's '{self.teacher_layers[layer]}' {tuple(theirs.shape)}; give both the same grid or points."
            )
        return plain_rows(ours.flatten(2).mT, theirs.flatten(2).mT, padded=self.form == "points")

    def build(self, student: Signals, teacher: Signals, batch: Batch) -> None:
        self._check_same_pillars(student, teacher)
        self.students, self.teachers = nn.ModuleList(), nn.ModuleList()
        for i in range(len(self.student_layers)):
            rows = self.rows(student, teacher, i)
            ours, theirs, number = rows.student.shape[-1], rows.teacher.shape[-1], rows.student.shape[1]
            if number < self.neighbours:
                warnings.warn(
                    f"pointdistiller: there are {number} rows, fewer than neighbours {self.neighbours}; all are taken.",
                    stacklevel=2,
                )
            if self.mode == "plain":
                self.students.append(nn.Linear(ours, theirs))
                continue
            self.students.append(EdgeEncoder(ours, self.width or ours, self.edge))
            self.teachers.append(EdgeEncoder(theirs, self.width or ours, self.edge))

    def _check_same_pillars(self, student: Signals, teacher: Signals) -> None:
        if self.form != "pillars":
            return
        ours, theirs = (s.require(f"tap:{COUNTS}") for s in (student, teacher))
        if ours.shape != theirs.shape or (ours.device.type == "cpu" and not torch.equal(ours, theirs)):
            raise UserError(
                "pointdistiller: student and teacher do not hold the same points in their pillars; give both the same "
                "range, size of pillars, and numbers of pillars and of points in one."
            )

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        frozen = self.freeze is not None and progress.epoch >= self.freeze
        losses = [self.layer(self.rows(student, teacher, i), i, frozen) for i in range(len(self.student_layers))]
        return {"loss": torch.stack(losses).sum()}

    def layer(self, rows: Rows, i: int, frozen: bool = False) -> Tensor:
        """The loss of one layer; `frozen`: the teacher's encoder gets no gradient."""
        if self.mode == "plain":
            with torch.no_grad():
                chosen, near = graph_of(rows, WATCHED, self.neighbours)
                self.seen[1] = self._agreement(rows, chosen, near)
            gap = (self.students[i](rows.student) - rows.teacher).square().mean(-1)
            return self.factor * (gap * rows.there).sum() / rows.there.sum().clamp_min(1)
        with torch.no_grad():
            chosen, near = graph_of(rows, self.queries, self.neighbours, self.select)
            valid = rows.there.gather(1, chosen)
            edges = valid[..., None] & rows.there.gather(1, near.flatten(1)).view_as(near)
            weights = self._weights(rows.importance.gather(1, chosen), valid)
        h_s = self.students[i](rows.student, chosen, near, edges)
        h_t = self.teachers[i](rows.teacher, chosen, near, edges)
        h_t = h_t.detach() if frozen else h_t
        with torch.no_grad():
            share = weights / weights.sum(1, keepdim=True).clamp_min(1e-12)
            amount = (1 / share.square().sum(1).clamp_min(1e-12)).mean()
            self.seen.copy_(torch.stack([amount, self._agreement(rows, chosen, near), h_t.float().std()]))
        if self.form == "points":
            h_s, h_t = h_s.amax(2), h_t.amax(2)
        return graph_loss(h_s, h_t, weights, valid, self.reweight, self.factor)

    def _weights(self, important: Tensor, valid: Tensor) -> Tensor:
        if self.reweight == "official" and self.form != "pillars":
            return torch.full_like(important, len(important) if self.form == "maps" else 1)
        return query_weights(important, self.temperature, self.reweight, valid)

    @staticmethod
    def _agreement(rows: Rows, chosen: Tensor, near: Tensor) -> Tensor:
        """The share of a query's neighbours that are its neighbours in the student too, of some queries."""
        few = chosen[:, :WATCHED]
        mine = nearest_rows(rows_at(rows.student, few), rows.student, near.shape[2], rows.there)
        alike = (mine[..., None] == near[:, :WATCHED, None]).any(-1).float().mean(-1)
        there = rows.there.gather(1, few).float()
        return (alike * there).sum() / there.sum().clamp_min(1)

    def figures(self) -> dict[str, float]:
        """Of the last step: queries that the weights amount to, the share of neighbours that the student has too, and
        the standard deviation of the teacher's encoded edges (0: both encoders have become a constant)."""
        if self.mode == "plain":
            return {"neighbour_agreement": float(self.seen[1])}
        return dict(zip(("effective_queries", "neighbour_agreement", "edge_spread"), self.seen.tolist()))
