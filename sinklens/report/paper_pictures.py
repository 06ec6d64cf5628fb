"""`PictureMap` for papers (matplotlib) and notebooks (plotly): one picture at a time, a panel per map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sinklens.core.errors import UsageError
from sinklens.core.pictures import CellGrid, PictureMap, PicturePage, Quantity

from . import colour, pictures
from .album import data_uri
from .picture_places import Group, frame, groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawn

MARKERS = {"ring": "o", "cross": "x", "dot": ".", "square": "s", "diamond": "D", "plus": "+"}
_PLOTLY = {
    "ring": "circle-open",
    "cross": "x-thin-open",
    "dot": "circle",
    "square": "square-open",
    "diamond": "diamond-open",
    "plus": "cross-thin-open",
}
GLYPHS = {"ring": "○", "cross": "×", "dot": "•", "square": "□", "diamond": "◇", "plus": "+"}
COLOURS = ("#b04a09", "#5b2c83", "#0a5c80", "#1d6a45", "#7c5300", "#3c4650")
_PANEL = 1.65
"""Width in inches that a panel takes at least."""

Stored = Mapping[str, np.ndarray]


def chosen(figure: PictureMap, page: int) -> PicturePage:
    """A page by its place.

    Raises:
        UsageError: There is no such page.
    """
    if not 0 <= page < len(figure.pages):
        count = len(figure.pages)
        raise UsageError(
            f"{figure.title!r} has no picture {page}.",
            detail=f"It has {count} picture{'s' if count != 1 else ''}, counted from 0.",
        )
    return figure.pages[page]


def maps(figure: PictureMap) -> list[int | None]:
    """What is drawn of a page: None for the classes (or the bare patches), then the quantities by place."""
    drawn: list[int | None] = [i for i, quantity in enumerate(figure.quantities) if quantity.drawn]
    return [None, *drawn] if figure.classes or not drawn else drawn


def draw(figure: PictureMap, page: int, stored: Stored, width: float, height: float | None) -> Drawn:
    """A page as matplotlib draws it: a row of panels per view, wrapped to the width."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawn

    shown = chosen(figure, page)
    panels = [(group, what) for group in groups(shown) for what in maps(figure)]
    columns = max(1, min(len(panels), int(width / _PANEL)))
    rows = -(-len(panels) // columns)
    sizes = [frame(shown, group, 1.0) for group in groups(shown)]
    tall = max(size.height / size.width for size in sizes) * width / columns
    drawn = Drawn(figsize=(width, height or rows * (tall + 0.5) + 0.35), layout="constrained")
    FigureCanvasAgg(drawn)
    scales = pictures.scales(figure)
    for index, (group, what) in enumerate(panels):
        axes = drawn.add_subplot(rows, columns, index + 1)
        several = len(sizes) > 1
        _panel(drawn, axes, figure, shown, group, what, stored, scales, several=several)
    drawn.suptitle(figure.title, fontsize=9)
    return drawn


def _panel(
    drawn: Drawn,
    axes: Axes,
    figure: PictureMap,
    page: PicturePage,
    group: Group,
    what: int | None,
    stored: Stored,
    scales: Mapping[str, colour.Scale],
    *,
    several: bool,
) -> None:
    name = figure.quantities[what].title if what is not None else "Classes" if figure.classes else "Patches"
    _ground(axes, page, group, stored, pale=what is not None)
    if what is not None:
        _values(drawn, axes, group, what, figure.quantities[what], scales[figure.quantities[what].key])
    room = frame(page, group, 72 * 0.8 * _PANEL)
    _marks(axes, figure, group, room.scale, only=None if what is None else 0)
    axes.set_title(f"{name} · {group.title}" if several else name, fontsize=7)
    if what is None and figure.classes:
        axes.legend(fontsize=6, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3)


def _ground(axes: Axes, page: PicturePage, group: Group, stored: Stored, *, pale: bool) -> None:
    ref = page.ref
    place = frame(page, group, 1.0)
    axes.patch.set(hatch="////", edgecolor="#c0c4c8", facecolor="white")
    pixels = stored.get(ref.sha256)
    extent = (0.0, float(ref.width), float(ref.height), 0.0)
    if pixels is None:
        axes.fill([0, ref.width, ref.width, 0], [0, 0, ref.height, ref.height], color="#ebedee")
    else:
        grey = pixels @ np.array([0.299, 0.587, 0.114])
        shown = 255 - 0.55 * (255 - np.repeat(grey[..., None], 3, axis=2)) if pale else pixels
        axes.imshow(shown.astype(np.uint8), extent=extent, interpolation="nearest", aspect="equal")
    for grid in group.grids:
        left, top, right, bottom = grid.box
        axes.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color="#545f6a", lw=0.7)
    axes.set_xlim(place.left, place.left + place.width / place.scale)
    axes.set_ylim(place.top + place.height / place.scale, place.top)
    axes.set_xticks([])
    axes.set_yticks([])


def _values(
    drawn: Drawn, axes: Axes, group: Group, what: int, quantity: Quantity, scale: colour.Scale
) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm, Normalize

    colours = ListedColormap([colour.hexadecimal(c) for c in scale.colours(light=True)])
    norm = (LogNorm if scale.log and scale.high > scale.low else Normalize)(scale.low, scale.high)
    for grid in group.grids:
        values = np.asarray(grid.values[what], dtype=float)
        shown = np.ma.masked_invalid(np.maximum(values, scale.low) if scale.log else values)
        left, top, right, bottom = grid.box
        look: dict[str, Any] = {"interpolation": "nearest", "alpha": 0.75, "aspect": "equal"}
        axes.imshow(shown, cmap=colours, norm=norm, extent=(left, right, bottom, top), **look)
    extend = "neither" if not scale.clipped else "both" if scale.signed else "max"
    bar = drawn.colorbar(
        ScalarMappable(norm, colours), ax=axes, orientation="horizontal", extend=extend, shrink=0.8, pad=0.03
    )
    bar.set_label(quantity.unit, fontsize=6)
    bar.ax.tick_params(labelsize=5)


def _marks(axes: Axes, figure: PictureMap, group: Group, scale: float, only: int | None) -> None:
    """`scale` is points per pixel of the picture, about: marks grow with their cells."""
    cell = min(
        min((g.box[2] - g.box[0]) / g.shape[1], (g.box[3] - g.box[1]) / g.shape[0]) for g in group.grids
    )
    usual = min(6.0, max(1.0, 0.55 * cell * scale))
    for index, class_ in enumerate(figure.classes):
        if only is not None and index != only:
            continue
        x, y = _places(group.grids, index)
        marker, ink = MARKERS.get(class_.mark, "+"), COLOURS[index % len(COLOURS)]
        hollow: dict[str, Any] = {"mfc": "none"} if class_.mark in ("ring", "square", "diamond") else {}
        size, line = (0.7 if class_.mark == "dot" else 1.0) * usual, max(0.4, 0.22 * usual)
        name = f"{class_.name} ({len(x)})"
        axes.plot(x, y, marker, color="white", ms=size + 0.2, mew=line + 0.6, ls="", **hollow)
        axes.plot(x, y, marker, color=ink, ms=size, mew=line, ls="", label=name, **hollow)


def _places(grids: Sequence[CellGrid], index: int) -> tuple[list[float], list[float]]:
    """Middles of the cells of a class, in pixels of the picture."""
    xs: list[float] = []
    ys: list[float] = []
    for grid in grids:
        if grid.classes is None:
            continue
        left, top, right, bottom = grid.box
        row, col = np.nonzero(np.asarray(grid.classes) == index)
        xs += (left + (col + 0.5) * (right - left) / grid.shape[1]).tolist()
        ys += (top + (row + 0.5) * (bottom - top) / grid.shape[0]).tolist()
    return xs, ys


def interactive(chart: Any, figure: PictureMap, page: int, stored: Stored) -> Any:
    """A page as plotly draws it: one panel per map of the first view, values under the pointer."""
    from plotly.subplots import make_subplots

    from .text import escaped

    shown = chosen(figure, page)
    group, what = groups(shown)[0], maps(figure)
    names = [
        str(escaped(figure.quantities[i].title))
        if i is not None
        else "Classes"
        if figure.classes
        else "Patches"
        for i in what
    ]
    made = make_subplots(1, len(what), subplot_titles=names, figure=chart)
    scales = pictures.scales(figure)
    pixels = stored.get(shown.ref.sha256)
    place = frame(shown, group, 1.0)
    for column, index in enumerate(what, start=1):
        if pixels is not None:
            size = {"x": 0, "y": 0, "sizex": shown.ref.width, "sizey": shown.ref.height, "sizing": "stretch"}
            look = {"layer": "below", "opacity": 1.0 if index is None else 0.4}
            made.add_layout_image(source=data_uri(pixels), **look, **size, row=1, col=column)
        for grid in group.grids:
            _plotly_grid(made, figure, grid, index, scales, column)
        _plotly_marks(made, figure, group, index, column)
        right, bottom = place.left + place.width / place.scale, place.top + place.height / place.scale
        axis = {"showgrid": False, "zeroline": False, "showticklabels": False}
        made.update_xaxes(range=[place.left, right], **axis, row=1, col=column)
        scaled: dict[str, Any] = {"scaleanchor": f"x{column if column > 1 else ''}"}
        made.update_yaxes(range=[bottom, place.top], **axis, **scaled, row=1, col=column)
    return made


def _plotly_grid(
    made: Any,
    figure: PictureMap,
    grid: CellGrid,
    index: int | None,
    scales: Mapping[str, colour.Scale],
    column: int,
) -> None:
    from .text import escaped

    left, top, right, bottom = grid.box
    rows, cols = grid.shape
    lines = [
        f"{escaped(q.title)} %{{customdata[{i + 1}]:.4g}} {escaped(q.unit)}"
        for i, q in enumerate(figure.quantities)
    ]
    custom = np.concatenate([np.asarray(grid.positions, dtype=float)[None], grid.values]).transpose(1, 2, 0)
    row, col = np.indices(grid.shape)
    text = [
        [f"row {r}, column {c}" for r, c in zip(*pair, strict=True)] for pair in zip(row, col, strict=True)
    ]
    values = np.zeros(grid.shape) if index is None else np.asarray(grid.values[index], dtype=float)
    common = {
        "x": left + (np.arange(cols) + 0.5) * (right - left) / cols,
        "y": top + (np.arange(rows) + 0.5) * (bottom - top) / rows,
        "customdata": custom,
        "text": text,
        "hovertemplate": "%{text} · token %{customdata[0]}<br>" + "<br>".join(lines) + "<extra></extra>",
        "showscale": False,
    }
    if index is None:
        made.add_heatmap(z=values, opacity=0, **common, row=1, col=column)
        return
    scale = scales[figure.quantities[index].key]
    ramp = scale.colours(light=True)
    colours = [[i / (len(ramp) - 1), colour.hexadecimal(c)] for i, c in enumerate(ramp)]
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.log10(np.where(values > 0, values, np.nan)) if scale.log else values
    low, high = (np.log10(scale.low), np.log10(scale.high)) if scale.log else (scale.low, scale.high)
    made.add_heatmap(z=z, zmin=low, zmax=high, colorscale=colours, opacity=0.75, **common, row=1, col=column)


def _plotly_marks(made: Any, figure: PictureMap, group: Group, index: int | None, column: int) -> None:
    from .text import escaped

    for number, class_ in enumerate(figure.classes):
        if index is not None and number != 0:
            continue
        x, y = _places(group.grids, number)
        ink = COLOURS[number % len(COLOURS)]
        marker = {
            "symbol": _PLOTLY.get(class_.mark, "cross-thin-open"),
            "color": ink,
            "size": 4 if class_.mark == "dot" else 8,
            "line": {"color": ink, "width": 2},
        }
        made.add_scatter(
            x=x, y=y, mode="markers", marker=marker, hoverinfo="skip", name=str(escaped(class_.name)),
            legendgroup=class_.name, showlegend=index is None, row=1, col=column,
        )  # fmt: skip
