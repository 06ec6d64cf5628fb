"""What lives in which layers, as SVG: a bar from birth to end, with rises, falls and gaps."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from sinklens.core.counts import counted
from sinklens.core.figures import Event, Life, Timeline

from . import colour, rows
from .heatmap import Drawing
from .numbers import brief, number
from .svg import canvas, index_ticks, label, tag, text_width
from .text import shorten

_LEGEND, _FOOT, _BAR = 22.0, 38.0, 9.0
_PALEST, _DARKEST = 12, 46
_SIGNS = {"rise": "written", "fall": "erased", "mark": "marked"}


def draw(figure: Timeline, *, width: int = 578) -> Drawing:
    """One row per life, over all layers of the model.

    Args:
        width: In px; the height follows from the number of rows.
    """
    shown = figure.rows[: rows.MOST_ROWS]
    if not shown or figure.layers < 1:
        return Drawing(None, ("There is nothing to draw.",))
    present = {event.kind for row in shown for event in row.events}
    kinds = [kind for kind in _SIGNS if kind in present]
    place = rows.layout(shown, width, _LEGEND if kinds else 4.0)
    scale = rows.Scale(-0.5, max(figure.layers, *(row.end + 1 for row in shown)) - 0.5, place)
    at = index_ticks(figure.layers, max(2, int(place.box[2] / 30)))
    depths = _depths(figure)
    svg = canvas(
        width,
        place.foot + _FOOT,
        _legend(kinds, place.box[0]),
        rows.stripes(place),
        *rows.grid(scale, at, [str(index) for index in at], figure.x_label),
        *rows.names(shown, place, width),
        *(_life(figure, row, scale, y, depths) for row, y in zip(shown, place.centres, strict=True)),
        description=describe(figure),
        class_="timeline",
    )
    return Drawing(svg, _notes(figure))


def describe(figure: Timeline) -> str:
    """The rows in one sentence, for readers who do not see them."""
    longest = max(figure.rows, key=lambda row: row.end - row.start)
    return (
        f"{figure.title}: {counted(len(figure.rows), 'row')} over {counted(figure.layers, 'layer')}; the longest is "
        f"{spoken(figure, longest)}."
    )


def spoken(figure: Timeline, row: Life) -> str:
    """One row in words: `position 17: layers 3 to 9, strength 0.41; written in layer 3 (MLP)`."""
    where = f"layer {row.start}" if row.start == row.end else f"layers {row.start} to {row.end}"
    strength = (
        f", {number(float(row.strength))} {figure.unit}".rstrip() if math.isfinite(row.strength) else ""
    )
    missing = f", not in {', '.join(map(str, row.gaps))}" if row.gaps else ""
    events = "".join(f"; layer {event.layer}: {event.label}" for event in row.events)
    return f"{row.label}: {where}{missing}{strength}{events}"


def pieces(row: Life) -> list[tuple[int, int]]:
    """The layers from start to end without the gaps, as runs (first, last)."""
    alive = [layer for layer in range(row.start, row.end + 1) if layer not in set(row.gaps)]
    cuts = [i + 1 for i, (a, b) in enumerate(pairwise(alive)) if b != a + 1]
    starts, ends = [0, *cuts], [*cuts, len(alive)]
    return [(alive[a], alive[b - 1]) for a, b in zip(starts, ends, strict=True) if b > a]


def _depths(figure: Timeline) -> colour.Scale | None:
    """Strengths to colours, from zero to the largest; None if there are none."""
    known = [row.strength for row in figure.rows if math.isfinite(row.strength)]
    return colour.Scale(0.0, max(known)) if known and max(known) > 0 else None


def _life(figure: Timeline, row: Life, scale: rows.Scale, y: float, depths: colour.Scale | None) -> Markup:
    look = "life"
    if depths is not None and math.isfinite(row.strength):
        # The palest fifth of the ramp would vanish on the page, and on its dark end the marks of events would.
        level = int(depths.levels(np.array([[row.strength]]))[0, 0])
        look = f"life q{_PALEST + level * (_DARKEST - _PALEST) // (colour.LEVELS - 1)}"
    start, end = scale.px(row.start - 0.5), scale.px(row.end + 0.5)
    bars = [
        tag(
            "rect",
            x=scale.px(a - 0.5),
            y=y - _BAR / 2,
            width=scale.px(b + 0.5) - scale.px(a - 0.5),
            height=_BAR,
            class_=look,
        )
        for a, b in pieces(row)
    ]
    return tag(
        "g",
        tag("title", spoken(figure, row)),
        tag("path", d=f"M{start:.1f} {y:.1f}H{end:.1f}", class_="rule"),
        *bars,
        *(_event(event, scale.px(event.layer), y) for event in row.events),
    )


def _event(event: Event, x: float, y: float) -> Markup:
    shapes = {
        "rise": f"M{x:.1f} {y - 6:.1f}l5 10h-10z",
        "fall": f"M{x:.1f} {y + 6:.1f}l5 -10h-10z",
    }
    around = shapes.get(event.kind, f"M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z")
    return tag(
        "path", tag("title", f"layer {event.layer}: {event.label}"), d=around, class_=f"event {event.kind}"
    )


def _legend(kinds: list[str], left: float) -> Markup:
    parts, x = [], left
    for kind in kinds:
        parts.append(_event(Event(0, _SIGNS[kind], kind), x + 6, 8.0))
        parts.append(label(_SIGNS[kind], x + 16, 12, "t"))
        x += 32 + text_width(shorten(_SIGNS[kind], 20))
    return tag("g", *parts, class_="legend")


def _notes(figure: Timeline) -> tuple[str, ...]:
    notes = []
    known = [row.strength for row in figure.rows if math.isfinite(row.strength)]
    if known and max(known) > 0 and len(set(known)) > 1:
        notes.append(
            f"The darker a bar, the larger its {figure.unit or 'strength'}, up to {brief(float(max(known)))}."
        )
    if any(row.gaps for row in figure.rows):
        notes.append("A thin line bridges layers in which it is absent.")
    return (*notes, *filter(None, [rows.cut(figure.rows)]))
