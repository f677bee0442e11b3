"""The study as one page, `dynamics.html`: learning curves of all features, critical times, and the probes of the
non-linear case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stillhouse.methods.pretraining.jepa_bias.study import DynamicsStudy
from stillhouse.methods.pretraining.jepa_bias.theory import KINDS
from stillhouse.reporting.figures import lines
from stillhouse.reporting.page import Cell, figure, grid, page, section, table, write

if TYPE_CHECKING:
    import plotly.graph_objects as go

NAMES = {"jepa": "JEPA", "mae": "MAE"}
MOST = 8
"""Curves in one plot; of more features, the first of each group are drawn."""


def write_dynamics(folder: Path, study: DynamicsStudy, title: str) -> Path:
    """Write `dynamics.html` and return its path."""
    shown = _chosen(study)
    body = []
    for kind in KINDS:
        name = NAMES[kind]
        plots = [
            figure(
                _curves(study, kind, shown),
                f"gains-{kind}",
                f"{name}: gain of the encoder over its end, for each feature. Lines: closed form.",
            )
        ]
        plots.append(
            figure(
                _times(study, kind), f"times-{kind}", f"{name}: when each feature reaches {study.share:g} of its end."
            )
        )
        body.append(
            section(name, f"Encoder of {study.depth} layers, from the layer scale {study.scale:g}.", grid(plots))
        )
    rows = []
    order = {k: {int(i): place + 1 for place, i in enumerate(study.order(k))} for k in KINDS}
    for i, feature in enumerate(study.names):
        cells = [Cell(feature)]
        values = [float(study.lam[i]), float(study.rho[i])]
        values += [v for k in KINDS for v in (float(study.times[k][i]), float(study.ends[k][i]))]
        cells += [Cell(f"{v:.4g}", v) for v in values]
        cells += [Cell(str(order[k].get(i, "never")), float(order[k].get(i, len(study.names) + 1))) for k in KINDS]
        rows.append(cells)
    headers = [
        "feature",
        "lam",
        "rho",
        *(h for k in KINDS for h in (f"{NAMES[k]}: critical time", f"{NAMES[k]}: final gain")),
    ]
    body.append(
        section(
            "Order",
            "In which order features are learned.",
            table([*headers, *(f"{NAMES[k]}: place" for k in KINDS)], rows),
        )
    )
    if study.probes:
        body.append(
            section(
                "Non-linear case", "A ReLU encoder on the same pairs, probed as it learns.", grid(_probes(study.probes))
            )
        )
    return write(folder / "dynamics.html", page(title, "which features a deep linear JEPA or MAE learns first", body))


def _chosen(study: DynamicsStudy) -> list[int]:
    """Indices of the features that are drawn: all, or the first of each group."""
    if len(study.names) <= MOST:
        return list(range(len(study.names)))
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(study.names):
        groups.setdefault(name.split()[0], []).append(i)
    each = max(MOST // len(groups), 1)
    return [i for members in groups.values() for i in members[:each]]


def _curves(study: DynamicsStudy, kind: str, shown: Sequence[int]) -> go.Figure:
    curves = {}
    start = 1 if study.grid[kind][0] == 0 else 0
    for i in shown:
        if study.ends[kind][i] > 0:
            curves[study.names[i]] = (
                study.grid[kind][start:].tolist(),
                (study.predicted[kind][start:, i] / study.ends[kind][i]).tolist(),
            )
    fig = lines(curves or {"none is learned": ([1.0], [0.0])}, "time", "gain / final gain")
    if study.simulated:
        for i in shown:
            if study.ends[kind][i] > 0:
                y = study.simulated[kind][start:, i] / study.ends[kind][i]
                mark = {"size": 4, "color": "#8A8F98"}
                fig.add_scatter(
                    x=study.grid[kind][start::6],
                    y=y[::6],
                    mode="markers",
                    marker=mark,
                    showlegend=False,
                    name=f"{study.names[i]}, simulated",
                )
    fig.update_xaxes(type="log", title="time, log scale")
    return fig


def _times(study: DynamicsStudy, kind: str) -> go.Figure:
    groups: dict[str, tuple[list[float], list[float]]] = {}
    for i, name in enumerate(study.names):
        if np.isfinite(study.times[kind][i]):
            xs, ys = groups.setdefault(name.split()[0], ([], []))
            xs.append(float(study.rho[i]))
            ys.append(float(study.times[kind][i]))
    fig = lines(groups or {"none is learned": ([0.0], [1.0])}, "rho", "critical time, log scale")
    fig.update_traces(mode="markers", marker={"size": 9})
    fig.update_yaxes(type="log")
    return fig


def _probes(probes: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """One plot a probe, both methods in each."""
    says = {
        "content": "How much of the clean components a ridge regression reads off the embedding (R^2).",
        "nuisance": "How much of the shared nuisance it reads off (R^2).",
        "knn": "Accuracy of the nearest neighbours in the embedding.",
        "size": "The embedding's standard deviation: near 0 where it has collapsed.",
    }
    out = []
    for name, text in says.items():
        curves = {NAMES[k]: (p["step"], p[name]) for k, p in probes.items() if name in p}
        if curves:
            out.append(figure(lines(curves, "optimiser step", name), f"probe-{name}", text))
    return out
