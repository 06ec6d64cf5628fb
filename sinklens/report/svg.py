"""Small helpers to write SVG: an element builder that escapes, and ticks at round numbers."""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup

from .text import escaped, shorten

FONT = 11
"""Text height in px, at the figure's natural size."""


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """An element. Children and values are escaped unless they are Markup; None drops an attribute.

    `_` in a name is `-`, `class_` is `class`; floats are written with two decimals at most.
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(Markup(key.rstrip("_").replace("_", "-")), _plain(value))
        for key, value in attributes.items()
        if value is not None
    )
    body = Markup("").join(escaped(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, body)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return escaped(value)


def label(text: Any, x: float, y: float, class_: str = "t", **attributes: Any) -> Markup:
    return tag("text", text, x=float(x), y=float(y), class_=class_, **attributes)


def text_width(text: str, font: float = FONT) -> float:
    """A guess in px, a little generous for the usual sans-serif faces; nothing depends on more than that."""
    return 1.1 * font * sum(_EMS.get(char, 0.67 if char.isupper() else 0.56) for char in text)


def fitted(text: str, room: float) -> str:
    """The text, cut so that it fits into `room` px; at least three characters stay."""
    clean = shorten(text, 200)
    if text_width(clean) <= room:
        return clean
    size = len(clean)
    while size > 3 and text_width(clean[:size]) > room:
        size -= 1
    return shorten(clean, size)


_EMS = (
    dict.fromkeys("ijl.,:;'|! ", 0.26) | dict.fromkeys('ftr()[]{}-"', 0.34) | dict.fromkeys("mwMW%@…", 0.86)
)
"""Widths of narrow and wide characters in ems."""


def canvas(width: float, height: float, *children: Any, description: str, **attributes: Any) -> Markup:
    """The outer element: crisp at its natural size, shrinking with its container."""
    return tag(
        "svg",
        tag("title", description),
        *children,
        viewBox=f"0 0 {math.ceil(width)} {math.ceil(height)}",
        width=math.ceil(width),
        height=math.ceil(height),
        role="img",
        xmlns="http://www.w3.org/2000/svg",
        **attributes,
    )


def index_ticks(n: int, most: int) -> list[int]:
    """Indices 0 to n-1 in even steps of 1, 2, 5 or 4, 8, ..., at most about `most`, always with the first."""
    if n <= most:
        return list(range(n))
    step = next(s for s in (2, 4, 5, 8, 10, 16, 20, 32, 50, *_decades(64)) if n / s <= most)
    return list(range(0, n, step))


def _decades(start: int) -> list[int]:
    return [start * 2**i for i in range(24)]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers inside [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    base = 10 ** math.floor(math.log10(rough))
    step = next(base * s for s in (1, 2, 2.5, 5, 10) if base * s >= rough)
    first = math.ceil(low / step - 1e-9)
    found = []
    while (first + len(found)) * step <= high + 1e-9 * step:
        found.append(round((first + len(found)) * step, 12))
    return found


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Powers of ten inside [low, high], thinned to `most`; 1-2-5 steps or even steps when there are fewer than two."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    powers = [10.0**e for e in range(first, last + 1)]
    if len(powers) >= 2:
        return powers[:: math.ceil(len(powers) / most)]
    fine = [m * 10.0**e for e in range(first - 1, last + 2) for m in (1, 2, 5)]
    inside = [value for value in fine if low <= value <= high]
    return inside if len(inside) >= 2 else ticks(low, high, 4)
