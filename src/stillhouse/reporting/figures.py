"""The plots of the reports: one look, one colour and one symbol for a name over all plots of a page.

Colours are those of Okabe and Ito, which people with any common colour blindness tell apart; the page gives text and
grid lines their light or dark ink.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go

from stillhouse.evaluation.quantities import Quantity

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6BB1", "#A6761D")
SYMBOLS = {
    "circle": "●",
    "square": "■",
    "diamond": "◆",
    "triangle-up": "▲",
    "cross": "✚",
    "x": "✖",
    "pentagon": "⬟",
    "triangle-down": "▼",
    "hexagon": "⬢",
}


@dataclass(frozen=True)
class Style:
    """The colour and symbol of a name; `mark` is the symbol as a letter, for text."""

    color: str
    symbol: str

    @property
    def mark(self) -> str:
        return SYMBOLS.get(self.symbol, "★")


TEACHER = Style("#8A8F98", "star")


@dataclass(frozen=True)
class Spread:
    """A figure of one method: a value per seed, their mean, and half the width of its confidence interval (0 where
    there is none)."""

    values: Sequence[float]
    mean: float
    half: float


def styles(names: Sequence[str]) -> dict[str, Style]:
    """A style for each name, in order; symbols go round at another pace than colours, so that pairs differ for long."""
    symbols = list(SYMBOLS)
    return {
        name: Style(PALETTE[i % len(PALETTE)], symbols[i % len(symbols)]) for i, name in enumerate(dict.fromkeys(names))
    }


def lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_title: str, y_title: str, may_be_log: bool = False
) -> go.Figure:
    """Curves by name, each (x, y). With `may_be_log`, the y axis is logarithmic where all values are positive and span
    more than a factor of 50."""
    fig, style = go.Figure(), styles(list(curves))
    seen = [v for _, ys in curves.values() for v in ys]
    log = may_be_log and min(seen) > 0 and max(seen) / min(seen) > 50
    for name, (xs, ys) in curves.items():
        mode = "lines+markers" if len(xs) <= 30 else "lines"
        fig.add_scatter(
            x=xs, y=ys, name=_plain(name), mode=mode, line={"color": style[name].color, "width": 2}, marker={"size": 5}
        )
    fig.update_yaxes(type="log" if log else "linear", title=y_title + (", log scale" if log else ""))
    fig.update_xaxes(title=x_title)
    return _finish(fig, height=300, legend=len(curves) > 1)


def dots(
    spreads: Mapping[str, Spread], shown: Quantity, style: Mapping[str, Style], teacher: tuple[str, float] | None = None
) -> go.Figure:
    """One line a method: a ring for each seed, a filled mark with a bar for the mean and its interval; a dashed line
    for the teacher."""
    fig = go.Figure()
    for name, spread in spreads.items():
        label, look = _wrapped(name), style[name]
        fig.add_scatter(
            x=[spread.mean * shown.scale],
            y=[label],
            mode="markers",
            name="mean",
            error_x={
                "type": "data",
                "array": [spread.half * shown.scale],
                "thickness": 1.5,
                "width": 7,
                "visible": spread.half > 0,
            },
            marker={"color": look.color, "size": 13, "symbol": look.symbol},
            hovertemplate="mean: %{x:.4~g}<extra></extra>",
        )
        fig.add_scatter(
            x=[v * shown.scale for v in spread.values],
            y=[label] * len(spread.values),
            mode="markers",
            name="one seed",
            marker={"color": look.color, "size": 9, "symbol": "circle-open", "line": {"width": 1.5}},
            hovertemplate="one seed: %{x:.4~g}<extra></extra>",
        )
    if teacher is not None:
        name, value = teacher
        fig.add_vline(x=value * shown.scale, line={"color": TEACHER.color, "dash": "dash", "width": 1.5})
        fig.add_scatter(
            x=[value * shown.scale],
            y=[_wrapped(name)],
            mode="markers",
            marker={"color": TEACHER.color, "size": 14, "symbol": TEACHER.symbol},
            hovertemplate="teacher: %{x:.4~g}<extra></extra>",
        )
    fig.update_yaxes(autorange="reversed", showgrid=False, ticklabelstandoff=6)
    fig.update_xaxes(title=shown.header)
    return _finish(fig, height=110 + 46 * (len(spreads) + (teacher is not None)), legend=False)


def trade(
    points: Mapping[str, tuple[float, Spread]],
    x: Quantity,
    y: Quantity,
    style: Mapping[str, Style],
    teacher: tuple[str, float, float] | None = None,
) -> go.Figure:
    """Quality against cost: a point with its interval for each method, (cost, quality); a star for the teacher."""
    fig = go.Figure()
    for name, (cost, spread) in points.items():
        fig.add_scatter(
            x=[cost * x.scale],
            y=[spread.mean * y.scale],
            name=_plain(name),
            mode="markers",
            error_y={
                "type": "data",
                "array": [spread.half * y.scale],
                "thickness": 1.5,
                "width": 5,
                "visible": spread.half > 0,
            },
            marker={"color": style[name].color, "size": 12, "symbol": style[name].symbol},
        )
    costs = [cost for cost, _ in points.values()]
    if teacher is not None:
        costs.append(teacher[1])
        marker = {"color": TEACHER.color, "size": 14, "symbol": TEACHER.symbol}
        fig.add_scatter(
            x=[teacher[1] * x.scale], y=[teacher[2] * y.scale], name=_plain(teacher[0]), mode="markers", marker=marker
        )
    wide = min(costs) > 0 and max(costs) / min(costs) > 5
    fig.update_xaxes(title=x.header + (", log scale" if wide else ""), type="log" if wide else "linear")
    fig.update_yaxes(title=y.header)
    return _finish(fig, height=320, legend=False)


def _finish(fig: go.Figure, height: int, legend: bool) -> go.Figure:
    axis = {
        "automargin": True,
        "zeroline": False,
        "exponentformat": "power",
        "gridcolor": "#d5d9de",
        "linecolor": "rgba(0,0,0,0)",
        "title": {"standoff": 10},
    }
    fig.update_xaxes(axis)
    fig.update_yaxes(axis)
    return fig.update_layout(
        template="none",
        height=height,
        margin={"l": 10, "r": 16, "t": 26, "b": 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={
            "family": "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif",
            "size": 13,
            "color": "#1c2127",
        },
        showlegend=legend,
        legend={"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0},
        dragmode=False,
        hovermode="closest",
        modebar={"bgcolor": "rgba(0,0,0,0)"},
    )


def _plain(text: str) -> str:
    """Text that plotly shows as it is, not as markup."""
    return escape(text, quote=False)


def _wrapped(label: str) -> str:
    return "<br>".join(_plain(part) for part in textwrap.wrap(label, 20)) or " "
