"""Figures for papers and notebooks: the same data through matplotlib (PDF, SVG, PNG) or plotly (interactive).

Nothing global changes: figures are made without pyplot, and settings for saving last as long as the saving.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sinklens.core.errors import UsageError
from sinklens.core.figures import Figure, Heatmap, Intervals, Lines, PictureMap, Samples, Timeline

from . import colour, paper_pictures, paper_rows, samples

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawn

_FORMATS = ("pdf", "svg", "png")
_MARKERS = ("o", "s", "^", "D", "x", "+")
_DASHES = ("-", "--", ":", "-.", (0, (4, 2)), (0, (1, 2)))
_COLOURS = ("#0a5c80", "#b04a09", "#5b6670", "#74428c", "#24734a", "#8a6a00")
_MOST_MARKERS = 40


def draw(
    figure: Figure,
    *,
    width: float = 3.4,
    height: float | None = None,
    page: int = 0,
    pictures: Mapping[str, np.ndarray] | None = None,
) -> Drawn:
    """The figure as matplotlib draws it, at the size of one column of a paper.

    Args:
        figure: Any figure; Samples are drawn as the map of their rate at its threshold.
        width, height: In inches; the height follows from the data when not given.
        page: Which picture of a `PictureMap`, by its place among the pages.
        pictures: RGB copies of pictures by their `sha256`; without a copy the frame stays empty.

    Raises:
        UsageError: There is no such page.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawn

    if isinstance(figure, PictureMap):
        return paper_pictures.draw(figure, page, pictures or {}, width, height)
    plain = samples.rate_map(figure) if isinstance(figure, Samples) else figure
    drawn = Drawn(figsize=(width, height or _height(plain, width)), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.add_subplot()
    if isinstance(plain, Heatmap):
        _heatmap(drawn, axes, plain)
    elif isinstance(plain, Lines):
        _lines(axes, plain)
    else:
        paper_rows.draw(axes, plain)
    axes.set_title(plain.title, fontsize=9)
    axes.tick_params(labelsize=7)
    return drawn


def save_figure(figure: Figure, path: str | os.PathLike[str], **options: Any) -> Path:
    """The figure as a file; the ending (`pdf`, `svg`, `png`) chooses the format. Text stays text.

    Files of equal data are equal: no date or random name goes in.

    Args:
        options: Those of `draw`.

    Raises:
        UsageError: The ending is another one.
    """
    from matplotlib import rc_context

    target = Path(path)
    kind = target.suffix.removeprefix(".").lower()
    if kind not in _FORMATS:
        raise UsageError(
            f"Cannot write a figure as {target.suffix or 'a file without ending'!r}.",
            hint=f"Use one of: {', '.join('.' + name for name in _FORMATS)}",
        )
    metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}[kind]
    settings: dict[Any, Any] = {"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "sinklens"}
    with rc_context(settings):
        draw(figure, **options).savefig(target, format=kind, dpi=300, metadata=metadata)
    return target


def _height(figure: Heatmap | Lines | Intervals | Timeline, width: float) -> float:
    if isinstance(figure, Lines):
        return 0.68 * width
    if isinstance(figure, Intervals | Timeline):
        return paper_rows.height(figure)
    rows, columns = np.shape(figure.values)
    return float(np.clip(width * rows / max(columns, 1), 0.5 * width, 1.3 * width)) + 0.4


def _heatmap(drawn: Drawn, axes: Axes, figure: Heatmap) -> None:
    from matplotlib.colors import ListedColormap, LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    values = np.asarray(figure.values, dtype=float)
    scale = colour.scale(values, log=figure.log, limits=figure.limits)
    shown = np.ma.masked_invalid(np.maximum(values, scale.low) if figure.log else values)
    colours = ListedColormap([colour.hexadecimal(c) for c in scale.colours(light=True)])
    norm = (LogNorm if figure.log and scale.high > scale.low else Normalize)(scale.low, scale.high)
    axes.patch.set(hatch="////", edgecolor="#c0c4c8", facecolor="white")
    image = axes.imshow(shown, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    for y, x in figure.marks:
        axes.plot(x, y, "o", mfc="none", mec="white", ms=8, mew=2.6)
        axes.plot(x, y, "o", mfc="none", mec="black", ms=8, mew=1.1)
    axes.set_xlabel(figure.x_label, fontsize=8)
    axes.set_ylabel(figure.y_label, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    bar = drawn.colorbar(
        image, ax=axes, extend="neither" if not scale.clipped else "both" if scale.signed else "max"
    )
    bar.set_label(figure.unit, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _lines(axes: Axes, figure: Lines) -> None:
    for i, series in enumerate(figure.series):
        x, y = np.asarray(series.x, dtype=float), np.asarray(series.y, dtype=float)
        look = {"color": _COLOURS[i % len(_COLOURS)], "label": series.name or None}
        if figure.bars:
            step = float(np.diff(np.unique(x)).min()) if len(np.unique(x)) > 1 else 1.0
            width = 0.82 * step / len(figure.series)
            axes.bar(x + (i - (len(figure.series) - 1) / 2) * width, y, width=width, **look)
        else:
            marker = _MARKERS[i % len(_MARKERS)] if len(x) <= _MOST_MARKERS else None
            thick = 2.0 if series.emphasis else 1.1
            dash: Any = _DASHES[i % len(_DASHES)] if figure.joined else ""
            marker = marker or (None if figure.joined else _MARKERS[i % len(_MARKERS)])
            axes.plot(x, y, ls=dash, lw=thick, marker=marker, ms=3, **look)
    if figure.log_y:
        axes.set_yscale("log")
    for x, name in figure.marks:
        axes.axvline(x, color="#5b6670", ls=":", lw=0.8)
        place: dict[str, Any] = {
            "xycoords": ("data", "axes fraction"),
            "rotation": 90,
            "va": "top",
            "ha": "right",
        }
        place["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8}
        axes.annotate(name, (x, 1.0), fontsize=6, **place)
    axes.set_xlabel(figure.x_label, fontsize=8)
    axes.set_ylabel(figure.y_label, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if any(series.name for series in figure.series):
        axes.legend(fontsize=7, frameon=False)


def interactive(
    figure: Figure, *, page: int = 0, pictures: Mapping[str, np.ndarray] | None = None
) -> go.Figure:
    """The figure as plotly draws it, for a notebook; the caption stands below.

    Args:
        page, pictures: As in `draw`.
    """
    import plotly.graph_objects as go

    plain = samples.rate_map(figure) if isinstance(figure, Samples) else figure
    chart = go.Figure()
    if isinstance(plain, PictureMap):
        chart = paper_pictures.interactive(chart, plain, page, pictures or {})
    elif isinstance(plain, Heatmap):
        _plotly_heatmap(chart, plain)
    elif isinstance(plain, Lines):
        _plotly_lines(chart, plain)
    else:
        paper_rows.interactive(chart, plain)
    chart.update_layout(title={"text": _html(plain.title)}, template="plotly_white")
    if not isinstance(plain, PictureMap):
        chart.update_xaxes(title={"text": _html(plain.x_label)})
    below = {"xref": "paper", "yref": "paper", "x": 0, "y": -0.28, "showarrow": False}
    chart.add_annotation(text=_html(plain.caption), **below)
    if isinstance(plain, Heatmap | Lines):
        chart.update_yaxes(title={"text": _html(plain.y_label)})
    return chart


def _plotly_heatmap(chart: Any, figure: Heatmap) -> None:
    values = np.asarray(figure.values, dtype=float)
    scale = colour.scale(values, log=figure.log, limits=figure.limits)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.log10(np.where(values > 0, values, np.nan)) if figure.log else values
    low, high = (np.log10(scale.low), np.log10(scale.high)) if figure.log else (scale.low, scale.high)
    ramp = scale.colours(light=True)
    colours = [[i / (len(ramp) - 1), colour.hexadecimal(c)] for i, c in enumerate(ramp)]
    hover = (
        f"{_html(figure.y_label)} %{{y}}, {_html(figure.x_label)} %{{x}}: %{{customdata:.4g}}<extra></extra>"
    )
    unit = ("log10 " if figure.log else "") + _html(figure.unit)
    chart.add_heatmap(
        z=z,
        zmin=low,
        zmax=high,
        colorscale=colours,
        customdata=values,
        hovertemplate=hover,
        colorbar={"title": unit},
    )
    if figure.marks:
        y, x = zip(*figure.marks, strict=True)
        ring = {"symbol": "circle-open", "size": 12, "color": "black", "line": {"width": 2}}
        chart.add_scatter(x=x, y=y, mode="markers", marker=ring, hoverinfo="skip", showlegend=False)
    chart.update_yaxes(autorange="reversed")


def _plotly_lines(chart: Any, figure: Lines) -> None:
    dashes = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
    for i, series in enumerate(figure.series):
        colour_ = _COLOURS[i % len(_COLOURS)]
        common = {"x": series.x, "y": series.y, "name": _html(series.name)}
        if figure.bars:
            chart.add_bar(**common, marker={"color": colour_})
        else:
            line = {"color": colour_, "dash": dashes[i % len(dashes)], "width": 3 if series.emphasis else 1.6}
            chart.add_scatter(**common, mode="lines" if figure.joined else "markers", line=line)
    for x, name in figure.marks:
        chart.add_vline(x=x, line={"dash": "dot", "width": 1}, annotation_text=_html(name))
    if figure.log_y:
        chart.update_yaxes(type="log")


def _html(text: str) -> str:
    """Plotly reads a subset of HTML in its texts; labels are plain text."""
    from .text import escaped

    return str(escaped(text))
