"""Pictures with their patches: classes as marks, numbers as colours over the paled picture, one page per picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from sinklens.core.pictures import CellGrid, PictureMap, PicturePage, Quantity

from . import colour, embed, picture_bars, png
from .album import Album
from .heatmap import level_paths
from .numbers import brief, with_unit
from .picture_marks import again, legend_mark, marks
from .picture_places import Frame, Group, area, frame, groups, meet, notes
from .svg import canvas, label, tag
from .text import shorten

SIDES = ((16, 264.0), (40, 360.0))
LARGEST_SIDE = 480.0
"""Sides of a drawing in px by the largest number of rows or columns they are for."""

PATH_CELLS = 256
MOST_PAGES = 32
_BAR = 34.0


@dataclass(frozen=True)
class Panel:
    """One drawing; `flip` names the panels that can be shown in its place."""

    title: str
    svg: Markup
    flip: str = ""


@dataclass(frozen=True)
class GroupView:
    """Grids that are drawn together. `spoken` describes them to readers who do not see them."""

    title: str
    panels: tuple[Panel, ...]
    notes: tuple[str, ...]
    spoken: str
    flips: tuple[str, ...]


@dataclass(frozen=True)
class Legend:
    """A class with its mark and how many cells have it."""

    mark: Markup
    name: str
    meaning: str
    count: int


@dataclass(frozen=True)
class PageView:
    """One picture of the pager."""

    title: str
    about: str
    sentence: str
    groups: tuple[GroupView, ...]
    legend: tuple[Legend, ...]
    beside: tuple[Panel, ...]
    notes: tuple[str, ...]


def draw(
    figure: PictureMap, identifier: str, album: Album
) -> tuple[dict[str, Any] | None, tuple[PageView, ...], tuple[str, ...]]:
    """The values that travel in the page, the pages, and sentences about what is not drawn."""
    scales_ = scales(figure)
    shown: list[PageView] = []
    data: list[dict[str, Any]] = []
    for page in figure.pages[:MOST_PAGES]:
        if not page.grids or not album.room_for(_size(page)):
            break
        shown.append(_page(figure, page, scales_, identifier, len(shown), album))
        data.append(_embedded(page))
    left = len(figure.pages) - len(shown)
    said = (f"The first {len(shown)} of {len(figure.pages)} pictures are drawn.",) if left and shown else ()
    if not shown:
        full = any(page.grids for page in figure.pages)
        why = (
            "There is no room for these pictures in the report." if full else "There are no pictures to draw."
        )
        return None, (), (why,)
    values = {
        "kind": "pictures",
        "quantities": [{"title": q.title, "unit": q.unit} for q in figure.quantities],
        "classes": [c.name for c in figure.classes],
        "pages": data,
    }
    return values, tuple(shown), said


def describe(figure: PictureMap, page: PicturePage) -> str:
    """Which picture it is, in words."""
    ref = page.ref
    name = f": {shorten(ref.name, 60)}" if ref.name else ""
    return f"Prompt {ref.prompt}, picture {ref.picture}{name}"


def _size(page: PicturePage) -> int:
    return sum(int(np.size(grid.positions)) * (len(grid.values) + 1) for grid in page.grids)


def scales(figure: PictureMap) -> dict[str, colour.Scale]:
    """Colour limits by quantity; those that name the same scale share one, over all pages."""
    together: dict[str, list[int]] = {}
    for i, quantity in enumerate(figure.quantities):
        together.setdefault(quantity.scale or f"own-{i}", []).append(i)
    found = {}
    for places in together.values():
        first = figure.quantities[places[0]]
        numbers = [np.ravel(g.values[i]) for p in figure.pages for g in p.grids for i in places]
        values = np.concatenate(numbers) if numbers else np.zeros(0)
        for i in places:
            found[figure.quantities[i].key] = colour.scale(values, log=first.log, limits=first.limits)
    return found


def _page(
    figure: PictureMap,
    page: PicturePage,
    scales: Mapping[str, colour.Scale],
    identifier: str,
    number_: int,
    album: Album,
) -> PageView:
    drawn = [_group(figure, page, group, scales, identifier, number_, album) for group in groups(page)]
    beside = []
    for place, quantity in enumerate(figure.quantities):
        svg = picture_bars.histogram(page.grids, place, quantity)
        if svg is not None:
            beside.append(Panel(f"{quantity.title}: how many patches", svg))
    bars = picture_bars.parts(page.bars, figure.bars_unit, figure.bars_title)
    if bars is not None:
        beside.append(Panel(figure.bars_title, bars))
    ref = page.ref
    missing = () if album.name(ref) else (_missing(album),)
    about = f"{ref.width} × {ref.height} px · sha256 {ref.sha256[:12]}"
    return PageView(
        describe(figure, page),
        about,
        page.sentence,
        tuple(drawn),
        _legend(figure, page),
        tuple(beside),
        missing,
    )


def _missing(album: Album) -> str:
    if not album.allowed:
        return "The picture is left out of this report; its hash identifies it."
    return "The report holds no copy of this picture; its hash identifies it."


def _legend(figure: PictureMap, page: PicturePage) -> tuple[Legend, ...]:
    held = [np.asarray(grid.classes) for grid in page.grids if grid.classes is not None]
    counts = [sum(int((classes == i).sum()) for classes in held) for i in range(len(figure.classes))]
    return tuple(
        Legend(legend_mark(i, class_.mark), class_.name, class_.meaning, counts[i])
        for i, class_ in enumerate(figure.classes)
    )


def _group(
    figure: PictureMap,
    page: PicturePage,
    group: Group,
    scales: Mapping[str, colour.Scale],
    identifier: str,
    number_: int,
    album: Album,
) -> GroupView:
    place = frame(page, group, _side(group))
    data = {
        "data_fig": identifier,
        "data_page": number_,
        "data_grids": " ".join(map(str, group.places)),
        "data_frame": f"{place.left:.6g} {place.top:.6g} {place.scale:.6g}",
    }
    name = f"{identifier}-{number_}-{group.places[0]}"
    panels = []
    said = notes(page, group)
    if figure.classes or not any(quantity.drawn for quantity in figure.quantities):
        over = [*_ground(page, group, place, album, pale=False), _lines(place, group)]
        over.append(marks(place, group.grids, figure.classes, name))
        panels.append(
            Panel("Classes" if figure.classes else "Patches", _panel(place, over, group.title, data))
        )
    shared = [quantity.scale for quantity in figure.quantities if quantity.scale and quantity.drawn]
    for i, quantity in enumerate(figure.quantities):
        if not quantity.drawn:
            continue
        scale = scales[quantity.key]
        over = [*_ground(page, group, place, album, pale=True), _cells(place, group, i, scale)]
        over.append(_lines(place, group))
        if figure.classes:
            over.append(again(place, group.grids, figure.classes, name, 0))
        spoken = _spoken(group, i, quantity)
        bar = _colour_bar(scale, quantity, place)
        flip = quantity.scale if shared.count(quantity.scale) > 1 else ""
        panels.append(Panel(quantity.title, _panel(place, over, spoken, data, bar), flip))
    said += _without_value(group, figure.quantities)
    flips = tuple(dict.fromkeys(panel.flip for panel in panels if panel.flip))
    words = [f"{group.title} of {describe(figure, page)}."]
    words += [_spoken(group, i, q) for i, q in enumerate(figure.quantities)]
    return GroupView(group.title, tuple(panels), tuple(said), " ".join(words), flips)


def _without_value(group: Group, quantities: Sequence[Quantity]) -> list[str]:
    """A sentence per map in which tokens have no number."""
    said = []
    for i, quantity in enumerate(quantities):
        empty = sum(
            int((~np.isfinite(g.values[i]) & (np.asarray(g.positions) >= 0)).sum()) for g in group.grids
        )
        if empty and quantity.drawn:
            said.append(
                f"{quantity.title}: {empty} patch{'es have' if empty > 1 else ' has'} no value (hatched)."
            )
    return said


def _side(group: Group) -> float:
    """Of all cells of the group along its longer side."""
    left, top = min(box[0] for box in group.boxes), min(box[1] for box in group.boxes)
    right, bottom = max(box[2] for box in group.boxes), max(box[3] for box in group.boxes)
    sizes = [(g.box[2] - g.box[0], g.box[3] - g.box[1], *g.shape) for g in group.grids]
    most = max(max((right - left) / w * cols, (bottom - top) / h * rows) for w, h, rows, cols in sizes)
    return next((side for cells, side in SIDES if most <= cells), LARGEST_SIDE)


def _panel(
    place: Frame,
    parts: Sequence[Markup],
    description: str,
    data: Mapping[str, Any],
    bar: Markup | None = None,
) -> Markup:
    height = place.height + 2 + (_BAR if bar is not None else 0)
    return canvas(
        place.width + 2,
        height,
        tag("g", *parts, transform="translate(1 1)"),
        *([] if bar is None else [bar]),
        description=description,
        class_="patches",
        **data,
    )


def _ground(page: PicturePage, group: Group, place: Frame, album: Album, *, pale: bool) -> list[Markup]:
    """Hatching, the picture on it, and a veil over what no cell covers."""
    picture = place.box((0.0, 0.0, float(page.ref.width), float(page.ref.height)))
    left, top, width, height = picture
    parts = [tag("rect", x=0, y=0, width=place.width, height=place.height, class_="hatch")]
    held = album.name(page.ref)
    if held is None:
        parts.append(tag("rect", x=left, y=top, width=width, height=height, class_="no-picture"))
    else:
        look = f"shown{' pale' if pale else ''}{'' if held[1] else ' smooth'}"
        move = f"translate({left:.3f} {top:.3f}) scale({width:.4f} {height:.4f})"
        parts.append(tag("use", href=f"#{held[0]}", transform=move, class_=look))
    whole = (0.0, 0.0, float(page.ref.width), float(page.ref.height))
    seen = "".join(_rect(place.box(both)) for box in group.boxes if area(both := meet(box, whole)) > 0)
    parts.append(tag("path", d=_rect(picture) + seen, class_="veil", fill_rule="evenodd"))
    return parts


def _rect(box: tuple[float, float, float, float]) -> str:
    left, top, width, height = box
    return f"M{left:.2f} {top:.2f}h{width:.2f}v{height:.2f}h{-width:.2f}z"


def _cells(place: Frame, group: Group, quantity: int, scale: colour.Scale) -> Markup:
    drawn = []
    for grid in group.grids:
        left, top, width, height = place.box(grid.box)
        rows, cols = grid.shape
        levels = scale.levels(np.asarray(grid.values[quantity], dtype=float))
        if levels.size <= PATH_CELLS:
            move = f"translate({left:.3f} {top:.3f}) scale({width / cols:.5f} {height / rows:.5f})"
            drawn.append(
                tag("g", level_paths(levels, scale.name), transform=move, shape_rendering="crispEdges")
            )
            continue
        box = {"x": left, "y": top, "width": width, "height": height, "preserveAspectRatio": "none"}
        for light, theme in ((True, "on-light"), (False, "on-dark")):
            source = png.data_uri(png.encode(levels, scale.colours(light=light)))
            drawn.append(tag("image", href=source, class_=theme, **box))
    return tag("g", *drawn, class_="over")


def _lines(place: Frame, group: Group) -> Markup:
    """The borders of cells where they are wide enough, and of grids."""
    inner, outer = [], []
    for grid in group.grids:
        left, top, width, height = place.box(grid.box)
        rows, cols = grid.shape
        outer.append(_rect((left, top, width, height)))
        if min(width / cols, height / rows) >= 7:
            inner += [f"M{left + width * i / cols:.2f} {top:.2f}v{height:.2f}" for i in range(1, cols)]
            inner += [f"M{left:.2f} {top + height * i / rows:.2f}h{width:.2f}" for i in range(1, rows)]
    parts = [tag("path", d="".join(inner), class_="cell-line")] if inner else []
    return tag("g", *parts, tag("path", d="".join(outer), class_="grid-line"))


def _colour_bar(scale: colour.Scale, quantity: Quantity, place: Frame) -> Markup:
    """The ramp lying down below the drawing, with its ends and the unit."""
    width, top = min(150.0, 0.5 * place.width), place.height + 10
    low, high = brief(float(scale.low) + 0.0), brief(float(scale.high) + 0.0)
    if scale.clipped:
        high, low = f"≥ {high}", f"≤ {low}" if scale.signed else low
    move = f"matrix(0 9 {-width / colour.LEVELS:.5f} 0 {width + 1:.3f} {top:.3f})"
    return tag(
        "g",
        tag("use", href="#ramp-signed" if scale.signed else "#ramp", transform=move),
        tag("rect", x=0.5, y=top - 0.5, width=width + 1, height=10, class_="frame"),
        label(low, 1, top + 21, "t tick"),
        label(high, width + 1, top + 21, "t tick", text_anchor="end"),
        label(f"{quantity.unit}{' (log)' if scale.log else ''}", width + 8, top + 9, "t axis"),
        class_="bar",
    )


def _spoken(group: Group, place: int, quantity: Quantity) -> str:
    """Where a quantity is largest, in one sentence."""
    best: tuple[float, str] | None = None
    for i, grid in enumerate(group.grids):
        values = np.asarray(grid.values[place], dtype=float)
        if not np.isfinite(values).any():
            continue
        flat = int(np.nanargmax(np.where(np.isfinite(values), values, -np.inf)))
        row, col = divmod(flat, values.shape[1])
        tile = f"tile {i}, " if len(group.grids) > 1 else ""
        if best is None or values[row, col] > best[0]:
            best = float(values[row, col]), f"{tile}row {row}, column {col}"
    if best is None:
        return f"{quantity.title}: no values."
    return f"{quantity.title}: largest {with_unit(best[0], quantity.unit)} {quantity.unit} at {best[1]}."


def _embedded(page: PicturePage) -> dict[str, Any]:
    return {
        "prompt": page.ref.prompt,
        "picture": page.ref.picture,
        "grids": [_embedded_grid(grid) for grid in page.grids],
    }


def _embedded_grid(grid: CellGrid) -> dict[str, Any]:
    classes = np.full(grid.shape, -1) if grid.classes is None else np.asarray(grid.classes)
    return {
        "view": grid.view,
        "shape": list(grid.shape),
        "box": [float(edge) for edge in grid.box],
        "positions": embed.packed(grid.positions, "<i4"),
        "values": embed.packed(grid.values),
        "classes": embed.packed(classes, "<i1"),
    }
