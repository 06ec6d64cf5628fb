"""`Intervals` and `Timeline` for papers (matplotlib) and notebooks (plotly)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sinklens.core.figures import Intervals, Life, Timeline

from . import colour, timeline
from .text import escaped, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OWN, _CONTROL, _SOFT = "#0a5c80", "#b04a09", "#5b6670"
_EVENTS = {"rise": ("^", "triangle-up"), "fall": ("v", "triangle-down")}


def height(figure: Intervals | Timeline) -> float:
    """In inches, from the number of rows."""
    return float(np.clip(0.17 * len(figure.rows) + 0.85, 1.2, 8.0))


def draw(axes: Axes, figure: Intervals | Timeline) -> None:
    """The rows from top to bottom, their names on the axis."""
    if isinstance(figure, Intervals):
        _intervals(axes, figure)
    else:
        _timeline(axes, figure)
    axes.set_yticks(range(len(figure.rows)), [shorten(_name(row), 60) for row in figure.rows], fontsize=6)
    axes.set_ylim(len(figure.rows) - 0.5, -0.5)
    axes.set_xlabel(figure.x_label, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def interactive(chart: Any, figure: Intervals | Timeline) -> None:
    """The same rows on a plotly figure."""
    if isinstance(figure, Intervals):
        _plotly_intervals(chart, figure)
    else:
        _plotly_timeline(chart, figure)
    names = [str(escaped(shorten(_name(row), 60))) for row in figure.rows]
    chart.update_yaxes(tickvals=list(range(len(names))), ticktext=names, autorange="reversed")


def _name(row: Any) -> str:
    return f"{row.group}: {row.label}" if row.group else row.label


def _sides(figure: Intervals) -> list[tuple[str, str, str, float, np.ndarray]]:
    """Name, colour, fill, offset and `[row, (value, low, high)]` of the own values and, if any, of the controls."""
    own = np.array([(row.value, row.low, row.high) for row in figure.rows], dtype=float).reshape(-1, 3)
    other = np.array([(row.control, row.control_low, row.control_high) for row in figure.rows], dtype=float)
    other = other.reshape(-1, 3)
    if not np.isfinite(other[:, 0]).any():
        return [(figure.value_label, _OWN, _OWN, 0.0, own)]
    return [
        (figure.value_label, _OWN, _OWN, -0.16, own),
        (figure.control_label, _CONTROL, "white", 0.16, other),
    ]


def _intervals(axes: Axes, figure: Intervals) -> None:
    y = np.arange(len(figure.rows), dtype=float)
    sides = _sides(figure)
    for name, edge, fill, offset, values in sides:
        axes.hlines(y + offset, values[:, 1], values[:, 2], color=edge, lw=1.4)
        axes.plot(values[:, 0], y + offset, "o", color=edge, mfc=fill, ms=3.6, label=name)
    if figure.reference is not None:
        axes.axvline(figure.reference, color=_SOFT, lw=0.8, ls=":")
    if len(sides) > 1:
        axes.legend(fontsize=6, frameon=False)


def _timeline(axes: Axes, figure: Timeline) -> None:
    for y, row in enumerate(figure.rows):
        axes.hlines(y, row.start, row.end, color=_SOFT, lw=0.6)
        spans = [(first - 0.5, last - first + 1) for first, last in timeline.pieces(row)]
        axes.broken_barh(spans, (y - 0.25, 0.5), facecolors=_fill(figure, row), edgecolors="#c0c4c8", lw=0.4)
        for event in row.events:
            marker = _EVENTS.get(event.kind, ("D", ""))[0]
            axes.plot(event.layer, y, marker, color=_CONTROL, mec="white", ms=4.5, mew=0.5)
    axes.set_xlim(-0.5, figure.layers - 0.5)


def _fill(figure: Timeline, row: Life) -> str:
    known = [other.strength for other in figure.rows if math.isfinite(other.strength)]
    if not known or max(known) <= 0 or not math.isfinite(row.strength):
        return _OWN
    ramp = colour.ramp(light=True)
    return colour.hexadecimal(ramp[12 + int((len(ramp) - 13) * max(row.strength, 0.0) / max(known))])


def _plotly_intervals(chart: Any, figure: Intervals) -> None:
    y = np.arange(len(figure.rows), dtype=float)
    for name, edge, fill, offset, values in _sides(figure):
        marker = {"color": fill, "line": {"color": edge, "width": 2}, "size": 8}
        bars = {
            "type": "data",
            "symmetric": False,
            "array": values[:, 2] - values[:, 0],
            "arrayminus": values[:, 0] - values[:, 1],
            "color": edge,
        }
        chart.add_scatter(
            x=values[:, 0], y=y + offset, mode="markers", name=str(escaped(name)), marker=marker, error_x=bars
        )
    if figure.reference is not None:
        chart.add_vline(x=figure.reference, line={"dash": "dot", "width": 1})


def _plotly_timeline(chart: Any, figure: Timeline) -> None:
    for y, row in enumerate(figure.rows):
        for first, last in timeline.pieces(row):
            chart.add_bar(
                x=[last - first + 1],
                y=[y],
                base=first - 0.5,
                orientation="h",
                marker={"color": _fill(figure, row)},
                hovertext=str(escaped(timeline.spoken(figure, row))),
                hoverinfo="text",
                showlegend=False,
            )
    events = [(event, y) for y, row in enumerate(figure.rows) for event in row.events]
    if events:
        chart.add_scatter(
            x=[event.layer for event, _ in events],
            y=[y for _, y in events],
            mode="markers",
            marker={
                "symbol": [_EVENTS.get(event.kind, ("", "diamond"))[1] for event, _ in events],
                "size": 10,
                "color": _CONTROL,
            },
            hovertext=[str(escaped(f"layer {event.layer}: {event.label}")) for event, _ in events],
            hoverinfo="text",
            showlegend=False,
        )
    chart.update_layout(barmode="overlay")
