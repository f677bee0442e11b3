"""Local graph distillation of pillars, maps and points: the arrays of `pointdistiller`."""

from __future__ import annotations

from typing import Any

import torch

from parity.case import Case
from stillhouse.objectives.pointdistiller import EdgeEncoder, PointDistiller, Rows, graph_of, plain_rows

RTOL = 1e-4


def _objective(case: Case, layers: int, **options: Any) -> PointDistiller:
    """The objective with the file's weights."""
    p = case.params
    k, edge = p["k"], "sub" if p.get("fuse") == "sub" else "concat"
    objective = PointDistiller(
        neighbours=k, edge=edge, select="top", student_layers=["x"] * layers, teacher_layers=["x"] * layers, **options
    )
    objective.students, objective.teachers = torch.nn.ModuleList(), torch.nn.ModuleList()
    for i in range(layers):
        for name, found in (("student", objective.students), ("teacher", objective.teachers)):
            prefix = f"{name}.{i}." if f"{name}.0.0.weight" in case.weights else f"{name}."
            weights = {n.removeprefix(prefix): v for n, v in case.weights.items() if n.startswith(prefix)}
            weight = weights["0.weight"].flatten(1)
            encoder = EdgeEncoder(weight.shape[1] // 2, len(weight), edge)
            encoder.load_state_dict(
                {"linear.weight": weight, **{f"norm.{n[2:]}": v for n, v in weights.items() if n.startswith("1.")}},
                strict=False,
            )
            found.append(encoder)
    objective.train(p.get("bn", "training mode") == "training mode")
    return objective


def _close_encoders(case: Case, objective: PointDistiller) -> None:
    for name, found in (("teacher", objective.teachers), ("student", objective.students)):
        if f"grad:{name}_conv" in case:
            weight = found[0].linear.weight
            gradient = None if weight.grad is None else weight.grad[..., None, None]
            case.close(f"grad:{name}_conv", gradient, rtol=RTOL, atol=1e-6)


def pillar(case: Case) -> None:
    p = case.params
    reweight = "official" if p.get("reweight", True) else "norm"
    objective = _objective(
        case, 1, queries=p["num_voxels"], temperature=p["temperature"], factor=p["factor"], reweight=reweight
    )
    counts = case["num_points"].float()[None]
    student, teacher = case.leaf("student"), case["teacher"]
    rows = Rows(student[None], teacher[None], counts, torch.ones_like(counts, dtype=torch.bool))
    loss = objective.layer(rows, 0)
    loss.backward()
    case.close("loss", loss.reshape(1), rtol=RTOL)
    chosen, near = graph_of(rows, p["num_voxels"], p["k"])
    order = chosen[0].argsort()
    case.close("knn_sorted_for_sorted_queries", near[0][order].sort(-1).values)
    case.close_grad("student", rtol=RTOL)
    _close_encoders(case, objective)


def bev_grid(case: Case) -> None:
    layers = sum(n.startswith("teacher") and n[7:].isdigit() for n in case.arrays)
    objective = _objective(case, layers, form="maps", queries=case.params["num_voxels"], reweight="official")
    losses = []
    for i in range(layers):
        ours, theirs = case.leaf(f"student{i}").flatten(2).mT, case[f"teacher{i}"].flatten(2).mT
        losses.append(objective.layer(plain_rows(ours, theirs, padded=False), i))
    torch.stack(losses).sum().backward()
    for i, loss in enumerate(losses):
        case.close(f"loss{i}", loss.reshape(1), rtol=RTOL)
        case.close_grad(f"student{i}", rtol=RTOL)


def points_pool(case: Case) -> None:
    objective = _objective(case, 1, form="points", queries=case.params["num_points"], reweight="official")
    ours, theirs = case.leaf("student").mT, case["teacher"].mT
    loss = objective.layer(plain_rows(ours, theirs, padded=True), 0)
    loss.backward()
    case.close("loss", loss.reshape(1), rtol=RTOL)
    case.close_grad("student", rtol=RTOL)


ADAPTERS = {"pillar": pillar, "bev_grid": bev_grid, "points_pool": points_pool}
