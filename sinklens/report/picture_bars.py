"""What stands beside the maps of a picture: the histogram of a quantity with its threshold, and parts of a whole."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from sinklens.core.counts import verb
from sinklens.core.pictures import CellGrid, Quantity

from .numbers import brief, number, percent
from .svg import canvas, fitted, label, tag, text_width

BINS = 16
_WIDTH, _HEIGHT, _TOP, _BOTTOM = 340.0, 196.0, 30.0, 38.0
_ROW, _NAMES = 20.0, 150.0


def histogram(grids: Sequence[CellGrid], place: int, quantity: Quantity) -> Markup | None:
    """How many cells have which value, with the threshold as a line; None without values or threshold.

    Heights grow with the logarithm of the count, because few cells of many lie above a threshold; the counts stand
    on the bars. The threshold is an edge between bars, so that no bar lies on both sides.
    """
    values = np.concatenate([np.asarray(grid.values[place], dtype=float).ravel() for grid in grids])
    values = values[np.isfinite(values)]
    if not values.size or quantity.threshold is None:
        return None
    edges = _edges(values, quantity.threshold)
    counts, _ = np.histogram(values, edges)
    low, high = float(edges[0]), float(edges[-1])
    room = _HEIGHT - _TOP - _BOTTOM
    top = math.log1p(int(counts.max()))
    px = lambda value: 8 + (_WIDTH - 16) * (value - low) / (high - low)  # noqa: E731
    bars = []
    for count, a, b in zip(counts.tolist(), edges, edges[1:], strict=False):
        if not count:
            continue
        tall = room * math.log1p(count) / top
        above = "above" if a >= quantity.threshold else "below"
        x, wide = px(float(a)), max(1.0, px(float(b)) - px(float(a)) - 1)
        bars.append(tag("rect", x=x, y=_TOP + room - tall, width=wide, height=tall, class_=above))
        if text_width(str(count)) <= wide + 8:
            bars.append(label(count, x + wide / 2, _TOP + room - tall - 3, "t tick", text_anchor="middle"))
    line = px(float(quantity.threshold))
    said = f"{quantity.threshold_label} = {brief(float(quantity.threshold))}"
    anchor = "end" if line > _WIDTH / 2 else "start"
    reached = int((values >= quantity.threshold).sum())
    parts = [
        *bars,
        tag("path", d=f"M8 {_TOP + room:g}h{_WIDTH - 16:g}", class_="rule"),
        tag("path", d=f"M{line:.1f} {_TOP - 12:g}v{room + 12:g}", class_="threshold"),
        label(said, line + (-4 if anchor == "end" else 4), _TOP - 16, "t strong-text", text_anchor=anchor),
        label(brief(low), 8, _HEIGHT - 24, "t tick"),
        label(brief(high), _WIDTH - 8, _HEIGHT - 24, "t tick", text_anchor="end"),
        label(f"{quantity.title}, {quantity.unit} →", 8, _HEIGHT - 8, "t axis"),
    ]
    return canvas(
        _WIDTH,
        _HEIGHT,
        *parts,
        description=f"Histogram of {quantity.title}: {reached} of {values.size} patches "
        f"{verb(reached, 'reaches', 'reach')} {said}; the largest "
        f"value is {number(float(values.max()))}.",
        class_="histogram",
    )


def _edges(values: np.ndarray, threshold: float) -> np.ndarray:
    """Even bins that have the threshold as one of their edges, begin at zero if values do not, and hold every value."""
    low, high = min(float(values.min()), threshold), max(float(values.max()), threshold)
    if 0 <= low < 0.5 * high:
        low = 0.0
    rough = (high - low) / BINS or 1.0
    before = round((threshold - low) / rough)
    step = (threshold - low) / before if before else rough
    after = max(1, math.floor((high - threshold) / step + 1e-9) + 1)
    return threshold + step * np.arange(-before - (0 if before or low == threshold else 1), after + 1)


def parts(bars: Sequence[tuple[str, float]], unit: str, title: str) -> Markup | None:
    """Parts of a whole as bars with their numbers; None if there are none."""
    known = [(name, float(value)) for name, value in bars if math.isfinite(value)]
    if not known:
        return None
    room = _WIDTH - _NAMES - 62
    largest = max(*(value for _, value in known), 0.0) or 1.0
    rows = []
    for i, (name, value) in enumerate(known):
        y = 6 + i * _ROW
        shown = f"{percent(100 * value)} %" if unit == "share" else f"{number(value)} {unit}"
        rows += [
            label(fitted(name, _NAMES - 8), _NAMES - 8, y + 12, "t", text_anchor="end"),
            tag("rect", x=_NAMES, y=y + 2, width=max(0.5, room * max(value, 0.0) / largest), height=_ROW - 6),
            label(shown, _NAMES + room * max(value, 0.0) / largest + 6, y + 12, "t tick"),
        ]
    spoken = ", ".join(f"{name} {number(value)}" for name, value in known)
    return canvas(_WIDTH, 12 + _ROW * len(known), *rows, description=f"{title}: {spoken}.", class_="parts-of")
