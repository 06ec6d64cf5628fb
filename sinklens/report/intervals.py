"""Values with their intervals beside their controls, as SVG: filled points for values, hollow ones for controls."""

from __future__ import annotations

import math
from collections.abc import Iterable

from markupsafe import Markup

from sinklens.core.counts import counted
from sinklens.core.figures import Estimate, Intervals

from . import rows
from .heatmap import Drawing
from .numbers import brief, number
from .svg import canvas, label, tag, text_width, ticks
from .text import shorten

_LEGEND, _FOOT, _APART = 22.0, 38.0, 4.0


def draw(figure: Intervals, *, width: int = 578, row_height: float = 20.0) -> Drawing:
    """One row per value, with a line at the reference.

    Args:
        width: In px; the height follows from the number of rows.
    """
    shown = figure.rows[: rows.MOST_ROWS]
    known = [value for row in shown for value in _numbers(row) if math.isfinite(value)]
    if not known:
        return Drawing(None, ("There are no values to draw.",))
    place = rows.layout(shown, width, _LEGEND, row_height)
    scale = rows.Scale(*limits(known, figure.reference), place)
    left, top, plot, height = place.box
    at = ticks(scale.low, scale.high, most=max(4, int(plot / 60)))
    parts = [
        rows.stripes(place),
        *rows.grid(scale, at, [brief(float(tick)) for tick in at], figure.x_label),
        *rows.names(shown, place, width),
    ]
    if figure.reference is not None:
        x = scale.px(figure.reference)
        parts.append(tag("path", d=f"M{x:.1f} {top:g}v{height:g}", class_="reference"))
    both = any(math.isfinite(row.control) for row in shown)
    parts += [_row(figure, row, scale, y) for row, y in zip(shown, place.centres, strict=True)]
    svg = canvas(
        width,
        place.foot + _FOOT,
        _legend(figure, left, both),
        *parts,
        description=describe(figure),
        class_="intervals",
    )
    return Drawing(svg, _notes(figure, both))


def limits(known: Iterable[float], reference: float | None) -> tuple[float, float]:
    """The axis: all numbers and the reference, with some air; never of no width."""
    values = [*known, *([] if reference is None else [reference])]
    low, high = min(values), max(values)
    air = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
    return low - air, high + air


def describe(figure: Intervals) -> str:
    """The rows in one sentence, for readers who do not see them."""
    known = [row for row in figure.rows if math.isfinite(row.value)]
    largest = max(known, key=lambda row: abs(row.value - (figure.reference or 0.0)), default=None)
    far = f"; farthest: {spoken(figure, largest)}" if largest else ""
    return f"{figure.title}: {counted(len(figure.rows), 'row')} ({figure.x_label}){far}."


def spoken(figure: Intervals, row: Estimate) -> str:
    """One row in words: `MLP of block 3 at the sink: −41.2 (−44.0 to −38.1); control 0.3 (−0.1 to 0.7)`."""
    own = f"{row.label}: {_with_interval(row.value, row.low, row.high)}"
    if not math.isfinite(row.control):
        return own
    return f"{own}; {figure.control_label} {_with_interval(row.control, row.control_low, row.control_high)}"


def _with_interval(value: float, low: float, high: float) -> str:
    known = math.isfinite(low) and math.isfinite(high)
    return number(float(value)) + (f" ({number(float(low))} to {number(float(high))})" if known else "")


def _numbers(row: Estimate) -> tuple[float, ...]:
    return (row.value, row.low, row.high, row.control, row.control_low, row.control_high)


def _row(figure: Intervals, row: Estimate, scale: rows.Scale, y: float) -> Markup:
    apart = _APART if math.isfinite(row.control) else 0.0
    return tag(
        "g",
        tag("title", spoken(figure, row)),
        _point(scale, y + apart, (row.control, row.control_low, row.control_high), hollow=True),
        _point(scale, y - apart, (row.value, row.low, row.high), hollow=False),
    )


def _point(scale: rows.Scale, y: float, numbers: tuple[float, float, float], *, hollow: bool) -> Markup:
    value, low, high = numbers
    parts = []
    if math.isfinite(low) and math.isfinite(high):
        left, right = scale.px(low), scale.px(high)
        parts.append(tag("path", d=f"M{left:.1f} {y:.1f}H{right:.1f}", class_="whisker"))
    if math.isfinite(value):
        parts.append(_disc(scale.px(value), y))
    return tag("g", *parts, class_="estimate hollow" if hollow else "estimate")


def _disc(x: float, y: float) -> Markup:
    return tag("circle", cx=x, cy=y, r=3.6)


def _legend(figure: Intervals, left: float, both: bool) -> Markup:
    """Which point is which; a single kind of points needs only its line of reference named."""
    parts, x = [], left
    kinds = ((figure.value_label, False), (figure.control_label, True)) if both else ()
    for name, hollow in kinds:
        look = "estimate hollow" if hollow else "estimate"
        whisker = tag("path", d=f"M{x:g} 8H{x + 20:g}", class_="whisker")
        parts.append(tag("g", whisker, _disc(x + 10, 8.0), class_=look))
        parts.append(label(shorten(name, 40), x + 26, 12, "t"))
        x += 42 + text_width(shorten(name, 40))
    if figure.reference is not None and figure.reference_label:
        parts.append(tag("path", d=f"M{x + 4:g} 2v12", class_="reference"))
        parts.append(label(shorten(figure.reference_label, 40), x + 12, 12, "t"))
    return tag("g", *parts, class_="legend")


def _notes(figure: Intervals, both: bool) -> tuple[str, ...]:
    found = [row for row in figure.rows if math.isfinite(row.low) and math.isfinite(row.high)]
    notes = [f"Bars: {figure.interval}."] if found else []
    if both:
        notes.append(f"Filled: {figure.value_label}; hollow: {figure.control_label}.")
    return (*notes, *filter(None, [rows.cut(figure.rows)]))
