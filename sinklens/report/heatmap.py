"""Heat maps as SVG: one path per colour level, or an inline image beyond a few thousand cells."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from markupsafe import Markup

from sinklens.core.figures import Heatmap

from . import colour, png
from .numbers import brief, number, with_unit
from .svg import canvas, index_ticks, label, tag, text_width

PATH_CELLS = 4000
"""Beyond this many cells an image is smaller and opens faster than paths."""

_LEFT, _TOP, _BOTTOM = 46, 20, 38
_MARGINAL, _BAR = 74, 66


@dataclass(frozen=True)
class Drawing:
    """A figure as SVG, or None and why; `notes` are sentences about the drawing, to stand by the caption."""

    svg: Markup | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Plot:
    """The place of the cells: origin, size of one cell, number of cells, in px."""

    x: float
    y: float
    cell_width: float
    cell_height: float
    columns: int
    rows: int

    @property
    def width(self) -> float:
        return self.cell_width * self.columns

    @property
    def height(self) -> float:
        return self.cell_height * self.rows


def draw(
    figure: Heatmap, *, figure_id: str, width: int = 578, height: int = 380, cap: tuple[int, int] = (80, 40)
) -> Drawing:
    """The map with axes, colour bar, marks and, for maps by layer, the mean of each row.

    Args:
        figure_id: Ties the drawing to its embedded values.
        width, height: Room in px; small maps use less, because a cell grows to `cap` at most.
    """
    values = np.asarray(figure.values, dtype=float)
    if values.ndim != 2 or not values.size or not np.isfinite(values).any():
        return Drawing(None, ("There are no values to draw.",))
    scale = colour.scale(values, log=figure.log, limits=figure.limits)
    with_rows = _has_marginal(figure, values)
    ends = [_end(scale, part) for part in (0.0, 0.5, 1.0)]
    bar = 14 + max(_BAR - 14, text_width(figure.unit), *(18 + text_width(end) for end in ends))
    plot = _place(values.shape, width - _LEFT - bar - (_MARGINAL if with_rows else 0), height, cap)
    right = plot.x + plot.width + (_MARGINAL if with_rows else 0)
    parts = [_cells(scale, values, plot), _frame(plot), _marks(figure, plot), *_axes(figure, plot)]
    if with_rows:
        parts.append(_row_means(values, plot))
    parts.append(_colour_bar(scale, right + 14, plot, figure.unit))
    svg = canvas(
        max(right + bar, _LEFT + text_width(figure.x_label) + 40),
        plot.y + max(plot.height, 70) + _BOTTOM,
        *parts,
        description=describe(figure),
        class_="heat",
        data_fig=figure_id,
        data_plot=f"{plot.x:g} {plot.y:g} {plot.width:g} {plot.height:g}",
        data_linked="layer-head" if (figure.y_label, figure.x_label) == ("layer", "head") else None,
    )
    return Drawing(svg, _notes(figure, values, plot, scale))


def describe(figure: Heatmap) -> str:
    """The map in one sentence, for readers who do not see it."""
    values = np.asarray(figure.values, dtype=float)
    row, column = np.unravel_index(
        int(np.nanargmax(np.where(np.isfinite(values), values, -np.inf))), values.shape
    )
    return (
        f"{figure.title}: {values.shape[0]} by {values.shape[1]} ({figure.y_label} by {figure.x_label}), "
        f"largest {with_unit(float(values[row, column]), figure.unit)} {figure.unit} "
        f"at {figure.y_label} {row}, {figure.x_label} {column}."
    )


def pooled(values: Float[np.ndarray, "y x"], rows: int, columns: int) -> Float[np.ndarray, "v u"]:
    """The map at no more than `rows` by `columns`; a new cell is the largest of its block."""
    steps = [math.ceil(n / most) for n, most in zip(values.shape, (rows, columns), strict=True)]
    pad = [(0, -n % step) for n, step in zip(values.shape, steps, strict=True)]
    filled = np.pad(np.where(np.isfinite(values), values, -np.inf), pad, constant_values=-np.inf)
    blocks = filled.reshape(filled.shape[0] // steps[0], steps[0], filled.shape[1] // steps[1], steps[1])
    largest = blocks.max(axis=(1, 3))
    return np.where(np.isneginf(largest), np.nan, largest)


def level_paths(levels: Int[np.ndarray, "y x"], ramp: str = "q") -> Markup:
    """One path per level in units of cells; neighbours in a row are joined. `ramp` is the letter of the classes."""
    commands: dict[int, list[str]] = {}
    for y, row in enumerate(levels.tolist()):
        start = 0
        for x in range(1, len(row) + 1):
            if x == len(row) or row[x] != row[start]:
                if row[start] >= 0:
                    commands.setdefault(row[start], []).append(f"M{start} {y}h{x - start}v1h{start - x}z")
                start = x
    return Markup("").join(
        tag("path", class_=f"{ramp}{level}", d="".join(commands[level])) for level in sorted(commands)
    )


def _place(shape: tuple[int, ...], width: float, height: float, cap: tuple[int, int]) -> _Plot:
    rows, columns = shape
    sizes = [
        min(room / n, most)
        for room, n, most in ((width, columns, cap[0]), (height - _TOP - _BOTTOM, rows, cap[1]))
    ]
    sizes = [math.floor(size) if size >= 4 else size for size in sizes]
    return _Plot(_LEFT, _TOP, sizes[0], sizes[1], columns, rows)


def _cells(scale: colour.Scale, values: np.ndarray, plot: _Plot) -> Markup:
    hatch = tag("rect", x=plot.x, y=plot.y, width=plot.width, height=plot.height, class_="hatch")
    small = (
        values
        if values.size <= PATH_CELLS
        else pooled(values, max(1, int(plot.height)), max(1, int(plot.width)))
    )
    levels = scale.levels(small)
    if values.size > PATH_CELLS:
        box = {
            "x": plot.x,
            "y": plot.y,
            "width": plot.width,
            "height": plot.height,
            "preserveAspectRatio": "none",
        }
        images = [
            tag(
                "image",
                href=png.data_uri(png.encode(levels, scale.colours(light=light))),
                class_=theme,
                **box,
            )
            for light, theme in ((True, "on-light"), (False, "on-dark"))
        ]
        return hatch + tag("g", *images, class_="cells")
    move = f"translate({plot.x:g} {plot.y:g}) scale({plot.cell_width:g} {plot.cell_height:g})"
    return hatch + tag(
        "g", level_paths(levels, scale.name), transform=move, class_="cells", shape_rendering="crispEdges"
    )


def _frame(plot: _Plot) -> Markup:
    return tag(
        "rect", x=plot.x - 0.5, y=plot.y - 0.5, width=plot.width + 1, height=plot.height + 1, class_="frame"
    )


def _radius(plot: _Plot) -> float:
    return max(5.0, min(9.0, 0.62 * max(plot.cell_width, plot.cell_height)))


def _few(figure: Heatmap, plot: _Plot) -> bool:
    """Whether rings would leave the map readable."""
    return (
        len(figure.marks) * (2 * _radius(plot)) ** 2 <= 0.2 * plot.width * plot.height
        or len(figure.marks) <= 4
    )


def _marks(figure: Heatmap, plot: _Plot) -> Markup:
    """Rings round the marked cells, or small dots in them when rings would hide the map."""
    places = [
        (plot.x + (x + 0.5) * plot.cell_width, plot.y + (y + 0.5) * plot.cell_height) for y, x in figure.marks
    ]
    if not _few(figure, plot):
        size = max(1.6, min(3.0, 0.3 * min(plot.cell_width, plot.cell_height)))
        step = f"h{size:.1f}v{size:.1f}h{-size:.1f}z"
        path = "".join(f"M{x - size / 2:.1f} {y - size / 2:.1f}{step}" for x, y in places)
        return tag("g", tag("path", d=path, class_="dot"), class_="marks")
    rings = [
        tag("circle", cx=x, cy=y, r=_radius(plot), class_=name)
        for x, y in places
        for name in ("ring-halo", "ring")
    ]
    return tag("g", *rings, class_="marks")


def _axes(figure: Heatmap, plot: _Plot) -> list[Markup]:
    parts = [
        label(f"{figure.y_label} ↓", 0, plot.y - 8, "t axis"),
        label(f"{figure.x_label} →", plot.x, plot.y + plot.height + 30, "t axis"),
    ]
    for index in index_ticks(plot.rows, max(2, int(plot.height / 16))):
        y = plot.y + (index + 0.5) * plot.cell_height
        parts.append(label(index, plot.x - 6, y + 4, "t tick", text_anchor="end"))
    for index in index_ticks(plot.columns, max(2, int(plot.width / 30))):
        x = plot.x + (index + 0.5) * plot.cell_width
        parts.append(label(index, x, plot.y + plot.height + 14, "t tick", text_anchor="middle"))
    return parts


def _has_marginal(figure: Heatmap, values: np.ndarray) -> bool:
    known = values[np.isfinite(values)]
    return figure.y_label == "layer" and not figure.log and bool(known.min() >= 0) and values.shape[1] > 1


def _row_means(values: np.ndarray, plot: _Plot) -> Markup:
    means = [float(np.mean(row[np.isfinite(row)])) if np.isfinite(row).any() else math.nan for row in values]
    top = max((mean for mean in means if math.isfinite(mean)), default=0.0)
    x, room = plot.x + plot.width + 8, _MARGINAL - 16
    gap = min(1.0, 0.2 * plot.cell_height)
    bars = []
    for index, mean in enumerate(means):
        if top > 0 and math.isfinite(mean):
            y = plot.y + index * plot.cell_height + gap / 2
            bars.append(tag("rect", x=x, y=y, width=room * mean / top, height=plot.cell_height - gap))
    return tag(
        "g",
        label("row mean", x, plot.y - 8, "t axis"),
        tag("path", d=f"M{x:g} {plot.y:g}v{plot.height:g}", class_="rule"),
        *bars,
        label(f"max {brief(top)}", x, plot.y + plot.height + 14, "t tick"),
        class_="means",
    )


def _colour_bar(scale: colour.Scale, x: float, plot: _Plot, unit: str) -> Markup:
    height = min(max(plot.height, 70), 180)
    parts = [
        tag(
            "use",
            href="#ramp-signed" if scale.signed else "#ramp",
            transform=f"translate({x:g} {plot.y:g}) scale(10 {height / colour.LEVELS:.4g})",
        ),
        tag("rect", x=x - 0.5, y=plot.y - 0.5, width=11, height=height + 1, class_="frame"),
        label(unit, x, plot.y - 8, "t axis"),
    ]
    if scale.high > scale.low:
        for part in (0.0, 0.5, 1.0):
            y = plot.y + (1 - part) * height
            text = _end(scale, part)
            parts.append(label(text, x + 15, y + (10 if part == 1 else 0 if part == 0 else 4), "t tick"))
    else:
        parts.append(label(brief(scale.low), x + 15, plot.y + height / 2 + 4, "t tick"))
    return tag("g", *parts, class_="bar")


def _end(scale: colour.Scale, part: float) -> str:
    """The number beside the colour bar."""
    value = brief(float(scale.at(part)) + 0.0)
    if not scale.clipped or part == 0.5 or (part == 0 and not scale.signed):
        return value
    return f"{'≥' if part else '≤'} {value}"


def _notes(figure: Heatmap, values: np.ndarray, plot: _Plot, scale: colour.Scale) -> tuple[str, ...]:
    notes = []
    known = values[np.isfinite(values)]
    if scale.signed:
        notes.append("Blue is below zero, orange above.")
    if scale.clipped and scale.signed:
        notes.append(
            f"Colours end at ±{number(scale.high)}; the largest size is {number(float(np.abs(known).max()))}."
        )
    elif scale.clipped:
        notes.append(
            f"Colours end at {number(scale.high)}; the largest value is {number(float(known.max()))}."
        )
    if values.size > PATH_CELLS and (plot.cell_width < 1 or plot.cell_height < 1):
        notes.append("Where cells are narrower than a pixel, the largest of them is drawn.")
    if known.size < values.size:
        notes.append(f"Hatched: no value ({values.size - known.size} of {values.size} cells).")
    if figure.marks:
        shape = "Ringed" if _few(figure, plot) else "Marked by a dot instead of a ring"
        notes.append(f"{shape}: {len(figure.marks)} cell{'s' if len(figure.marks) > 1 else ''}.")
    if figure.log:
        notes.append("Colours are even in the logarithm.")
    return tuple(notes)
