"""Curves and bars as SVG. Series differ by colour, dash and marker, so that they also differ in grey."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup

from sinklens.core.figures import Lines, Series

from .heatmap import Drawing
from .numbers import brief, number
from .svg import canvas, label, log_ticks, tag, text_width, ticks
from .text import shorten

STYLES = 6
_LEFT, _RIGHT, _BOTTOM, _LEGEND = 62, 16, 38, 18
_MOST_POINTS = 1200
_MOST_MARKERS = 40
_SHORTEST_NAME = 6


@dataclass(frozen=True)
class _Axes:
    """Two scales: data to px."""

    x: tuple[float, float]
    y: tuple[float, float]
    box: tuple[float, float, float, float]
    log: bool

    def px(self, x: float) -> float:
        low, high = self.x
        return self.box[0] + (self.box[2] * (x - low) / (high - low) if high > low else self.box[2] / 2)

    def py(self, y: float) -> float:
        low, high = (math.log(v) for v in self.y) if self.log else self.y
        part = ((math.log(y) if self.log else y) - low) / (high - low) if high > low else 0.5
        return self.box[1] + self.box[3] * (1 - part)


@dataclass(frozen=True)
class XAxis:
    """A common horizontal axis for drawings that stand side by side.

    Attributes:
        limits: First and last value of the axis, whatever the curves reach.
        names: Words in place of numbers at some values; left out where they have no room.
        joined: False draws points without lines, for values that have no order.
    """

    limits: tuple[float, float]
    names: Mapping[float, str] = field(default_factory=dict)
    joined: bool = True


def draw(
    figure: Lines, *, figure_id: str, width: int = 578, height: int = 300, x_axis: XAxis | None = None
) -> Drawing:
    """The curves with axes, a legend above and labelled vertical marks; NaN breaks a line.

    Args:
        figure_id: Ties the drawing to its embedded values.
        width, height: Size in px.
        x_axis: The axis of all drawings beside this one; by default what the curves reach.
    """
    series = [_usable(s, figure.log_y) for s in figure.series]
    if not any(np.isfinite(s.y).any() for s in series):
        return Drawing(None, ("There are no values to draw.",))
    joined = figure.joined and (x_axis is None or x_axis.joined)
    legend, rows = _legend(series, width - _LEFT - _RIGHT, bars=figure.bars, joined=joined)
    mark_rows = _mark_rows(figure)
    top = 8 + _LEGEND * rows + 13 * mark_rows
    box = (_LEFT, top, width - _LEFT - _RIGHT, height - top - _BOTTOM)
    axes = _axes(figure, series, box, x_axis.limits if x_axis else None)
    body = _bars(series, axes) if figure.bars else [_curve(s, i, axes, joined) for i, s in enumerate(series)]
    order = sorted(range(len(body)), key=lambda i: series[i].emphasis if i < len(series) else False)
    svg = canvas(
        width,
        height,
        legend,
        *_grid(figure, axes),
        *_x_ticks(figure, axes, x_axis.names if x_axis else {}),
        *_marks(figure, axes, mark_rows),
        *(body if figure.bars else [body[i] for i in order]),
        description=describe(figure),
        class_="curves",
        data_fig=figure_id,
        data_plot=" ".join(f"{v:g}" for v in axes.box),
        data_x=f"{axes.x[0]:.8g} {axes.x[1]:.8g}",
    )
    return Drawing(svg, _notes(figure))


def describe(figure: Lines) -> str:
    """The curves in one sentence, for readers who do not see them."""
    parts = []
    for s in figure.series[:STYLES]:
        y = np.asarray(s.y, dtype=float)
        if np.isfinite(y).any():
            at = int(np.nanargmax(np.where(np.isfinite(y), y, -np.inf)))
            peak = f"{number(float(y[at]))} at {figure.x_label} {number(float(s.x[at]))}"
            parts.append(f"{s.name or 'the curve'} reaches {peak}")
    return f"{figure.title} ({figure.y_label} by {figure.x_label}): {'; '.join(parts)}."


def _usable(series: Series, log: bool) -> Series:
    x, y = np.asarray(series.x, dtype=float), np.asarray(series.y, dtype=float)
    known = np.isfinite(y) & np.isfinite(x) & ((y > 0) | (not log))
    return Series(series.name, x, np.where(known, y, np.nan), series.emphasis)


def _axes(
    figure: Lines,
    series: list[Series],
    box: tuple[float, float, float, float],
    limits: tuple[float, float] | None,
) -> _Axes:
    known = [np.isfinite(s.y) for s in series]
    xs = np.concatenate([s.x[k] for s, k in zip(series, known, strict=True)])
    ys = np.concatenate([s.y[k] for s, k in zip(series, known, strict=True)])
    marked = [x for x, _ in figure.marks if math.isfinite(x)]
    x = (
        (min(float(xs.min()), *marked), max(float(xs.max()), *marked))
        if marked
        else (float(xs.min()), float(xs.max()))
    )
    if limits is not None:
        x = limits
    elif figure.bars:
        half = _spacing(series) / 2
        x = (x[0] - half, x[1] + half)
    low, high = float(ys.min()), float(ys.max())
    if figure.log_y:
        low, high = (low / 1.25, high * 1.25)
    else:
        low = min(0.0, low) if figure.bars or low >= 0 else low - 0.05 * (high - low)
        high = max(0.0, high) + 0.06 * (high - low)
    return _Axes(x, (low, high), box, figure.log_y)


def _grid(figure: Lines, axes: _Axes) -> list[Markup]:
    left, top, width, height = axes.box
    parts = []
    for value in log_ticks(*axes.y) if axes.log else ticks(*axes.y, most=max(2, int(height / 34))):
        y = axes.py(value)
        parts.append(tag("path", d=f"M{left:g} {y:.1f}h{width:g}", class_="grid"))
        parts.append(label(brief(float(value)), left - 7, y + 4, "t tick", text_anchor="end"))
    parts.append(tag("path", d=f"M{left:g} {top + height:g}h{width:g}", class_="rule"))
    parts.append(label(f"{figure.x_label} →", left, top + height + 31, "t axis"))
    middle = top + height / 2
    turned = f"rotate(-90 13 {middle:.1f})"
    parts.append(
        label(shorten(figure.y_label, 44), 13, middle, "t axis", text_anchor="middle", transform=turned)
    )
    return parts


def _x_ticks(figure: Lines, axes: _Axes, names: Mapping[float, str]) -> list[Markup]:
    """Names where they have room, else round numbers: whole ones if all values are whole."""
    _, top, width, height = axes.box
    y = top + height + 15
    room = width * (min(np.diff(sorted(names)), default=1.0) / (axes.x[1] - axes.x[0])) if names else 0.0
    most = int(room / text_width("x")) - 1
    if most >= _SHORTEST_NAME:
        return [
            label(shorten(name, most), axes.px(x), y, "t tick", text_anchor="middle")
            for x, name in names.items()
        ]
    whole = all(
        float(v).is_integer() for s in figure.series for v in np.asarray(s.x, dtype=float) if math.isfinite(v)
    )
    parts = []
    for value in ticks(*axes.x, most=max(2, int(width / 62))):
        if float(value).is_integer() or not whole:
            parts.append(label(brief(float(value)), axes.px(value), y, "t tick", text_anchor="middle"))
    return parts


def _curve(series: Series, index: int, axes: _Axes, joined: bool = True) -> Markup:
    style = f"s{index % STYLES}"
    x, y = _thinned(series.x, series.y) if joined else (series.x, series.y)
    path, pen = [], False
    points = []
    for value, height in zip(x.tolist(), y.tolist(), strict=True):
        if not math.isfinite(height):
            pen = False
            continue
        at = f"{axes.px(value):.1f} {axes.py(height):.1f}"
        path.append(("L" if pen else "M") + at)
        points.append(at)
        pen = True
    markers = points if len(points) <= _MOST_MARKERS or not joined else []
    name = style + (" strong" if series.emphasis else "")
    return tag(
        "g",
        tag("path", d="".join(path), class_="line") if joined else "",
        Markup("").join(
            _marker(index, *(float(v) for v in at.split()), r=2.6 if joined else 4.0) for at in markers
        ),
        class_=name,
    )


def _marker(index: int, x: float, y: float, r: float = 2.6) -> Markup:
    d = r + 1
    shapes = (
        f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r:.1f} 0a{r} {r} 0 1 0 {-2 * r:.1f} 0z",
        f"M{x - r:.1f} {y - r:.1f}h{2 * r:.1f}v{2 * r:.1f}h{-2 * r:.1f}z",
        f"M{x:.1f} {y - r - 1:.1f}l{r + 1:.1f} {2 * r + 1:.1f}h{-2 * r - 2:.1f}z",
        f"M{x:.1f} {y - d:.1f}l{d:.1f} {d:.1f}l{-d:.1f} {d:.1f}l{-d:.1f} {-d:.1f}z",
        f"M{x - r:.1f} {y - r:.1f}l{2 * r:.1f} {2 * r:.1f}m0 {-2 * r:.1f}l{-2 * r:.1f} {2 * r:.1f}",
        f"M{x - r:.1f} {y:.1f}h{2 * r:.1f}m{-r:.1f} {-r:.1f}v{2 * r:.1f}",
    )
    return tag("path", d=shapes[index % STYLES], class_="mark" if index % STYLES < 4 else "mark open")


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_MOST_POINTS` points; each bucket keeps its smallest and largest, so that no spike is lost."""
    if len(x) <= _MOST_POINTS:
        return x, y
    keep: set[int] = {0, len(x) - 1}
    for bucket in np.array_split(np.arange(len(x)), _MOST_POINTS // 2):
        values = y[bucket]
        if np.isfinite(values).any():
            keep.add(int(bucket[np.nanargmin(values)]))
            keep.add(int(bucket[np.nanargmax(values)]))
        if np.isnan(values).any():
            keep.add(int(bucket[np.isnan(values)][0]))
    order = sorted(keep)
    return x[order], y[order]


def _spacing(series: list[Series]) -> float:
    xs = np.unique(np.concatenate([s.x[np.isfinite(s.y)] for s in series]))
    return float(np.diff(xs).min()) if len(xs) > 1 else 1.0


def _bars(series: list[Series], axes: _Axes) -> list[Markup]:
    step = axes.box[2] * _spacing(series) / (axes.x[1] - axes.x[0])
    thick = 0.82 * step / len(series)
    foot = axes.box[1] + axes.box[3] if axes.log else axes.py(0.0)
    groups = []
    for index, s in enumerate(series):
        offset = (index - len(series) / 2) * thick
        rects = [
            tag(
                "rect",
                x=axes.px(x) + offset,
                width=max(thick, 0.5),
                y=min(axes.py(y), foot),
                height=abs(axes.py(y) - foot),
            )
            for x, y in zip(s.x.tolist(), s.y.tolist(), strict=True)
            if math.isfinite(y)
        ]
        groups.append(tag("g", *rects, class_=f"s{index % STYLES} bars"))
    return groups


def _legend(series: list[Series], room: float, *, bars: bool, joined: bool) -> tuple[Markup, int]:
    """The legend and its number of rows; a single unnamed series needs none."""
    if len(series) == 1 and not series[0].name:
        return Markup(""), 0
    parts, x, row = [], 0.0, 0
    for index, s in enumerate(series):
        name = shorten(s.name, 40)
        width = 34 + text_width(name)
        if x and x + width > room:
            x, row = 0.0, row + 1
        left, y = _LEFT + x, 12 + _LEGEND * row
        sample = tag("path", d=f"M{left:g} {y - 4:g}h22", class_="line")
        marker = _marker(index, left + 11, y - 4, r=2.6 if joined else 4.0)
        sample = sample if joined else Markup("")
        if bars:
            sample, marker = tag("rect", x=left + 8, y=y - 9, width=10, height=10), Markup("")
        strong = " strong" if s.emphasis else ""
        parts.append(
            tag("g", sample, marker, class_=f"s{index % STYLES}{strong}" + (" bars" if bars else ""))
        )
        parts.append(label(name, left + 27, y, "t"))
        x += width
    return tag("g", *parts, class_="legend"), row + 1


def _mark_rows(figure: Lines) -> int:
    return min(3, len(figure.marks))


def _marks(figure: Lines, axes: _Axes, rows: int) -> list[Markup]:
    """Vertical lines; their labels climb like stairs so that neighbours do not overlap."""
    left, top, width, height = axes.box
    parts = []
    for index, (x, text) in enumerate(
        sorted((m for m in figure.marks if math.isfinite(m[0])), key=lambda m: m[0])
    ):
        at, name = axes.px(x), shorten(text, 30)
        y = top - 4 - 13 * (rows - 1 - index % rows)
        turned = at + text_width(name) > left + width
        parts.append(tag("path", d=f"M{at:.1f} {y + 2:.1f}V{top + height:g}", class_="vertical"))
        parts.append(
            label(name, at + (-4 if turned else 4), y, "t tick", text_anchor="end" if turned else None)
        )
    return parts


def _notes(figure: Lines) -> tuple[str, ...]:
    notes = ["Logarithmic axis."] if figure.log_y else []
    if len(figure.series) > STYLES:
        notes.append(f"Line styles repeat after {STYLES} series.")
    return tuple(notes)
