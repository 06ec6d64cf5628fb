"""What the drawings made of named rows share: labels to the left, headings of groups, words to the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from markupsafe import Markup

from .svg import fitted, label, tag, text_width
from .text import shorten

MOST_ROWS = 40
"""Rows drawn; a longer list is cut and says so, the table below the figure has all."""

_LABEL_SHARE, _NOTE_SHARE, _MOST_CHARS = 0.34, 0.26, 90
_LABEL_SHARE_ALONE = 0.42
_ROW, _GROUP = 20.0, 22.0


class Named(Protocol):
    """A row of `Intervals` or of `Timeline`."""

    @property
    def label(self) -> str: ...
    @property
    def note(self) -> str: ...
    @property
    def group(self) -> str: ...


@dataclass(frozen=True)
class Layout:
    """Where rows stand: `box` is the plot (x, y, width, height), `centres` the middle of each row, in px."""

    box: tuple[float, float, float, float]
    centres: tuple[float, ...]
    headings: tuple[tuple[float, str], ...]
    row: float

    @property
    def foot(self) -> float:
        return self.box[1] + self.box[3]


@dataclass(frozen=True)
class Scale:
    """A horizontal axis: data to px inside a layout's plot."""

    low: float
    high: float
    place: Layout

    def px(self, value: float) -> float:
        left, _, width, _ = self.place.box
        return left + width * (value - self.low) / (self.high - self.low)


def layout(rows: Sequence[Named], width: float, top: float, row_height: float = _ROW) -> Layout:
    """Room for the longest label and note within their shares of the width; the plot gets the rest."""
    share = _LABEL_SHARE if any(row.note for row in rows) else _LABEL_SHARE_ALONE
    left = _column([row.label for row in rows], share * width)
    right = _column([row.note for row in rows], _NOTE_SHARE * width)
    y, before, centres, headings = top, "", [], []
    for row in rows:
        if row.group != before:
            y += _GROUP
            headings.append((y - 6, row.group))
            before = row.group
        centres.append(y + row_height / 2)
        y += row_height
    return Layout((left, top, width - left - right, y - top), tuple(centres), tuple(headings), row_height)


def _column(words: Sequence[str], most: float) -> float:
    longest = max((text_width(shorten(word, _MOST_CHARS)) for word in words), default=0.0)
    return max(min(longest + 10, most), 10.0)


def names(rows: Sequence[Named], place: Layout, width: float) -> list[Markup]:
    """Headings, labels at the left edge and notes at the right, shortened to their columns."""
    left, _, plot, _ = place.box
    parts = [label(shorten(heading, 80), 0, y, "t strong-text") for y, heading in place.headings if heading]
    for row, y in zip(rows, place.centres, strict=True):
        parts.append(label(fitted(row.label, left - 8), left - 8, y + 4, "t", text_anchor="end"))
        if row.note:
            room = width - left - plot - 8
            parts.append(label(fitted(row.note, room), left + plot + 8, y + 4, "t tick"))
    return parts


def grid(scale: Scale, values: Sequence[float], words: Sequence[str], title: str) -> list[Markup]:
    """Vertical lines with their numbers below, the foot of the plot, and the axis' name."""
    left, top, width, height = scale.place.box
    parts = []
    for value, word in zip(values, words, strict=True):
        x = scale.px(value)
        parts.append(tag("path", d=f"M{x:.1f} {top:g}v{height:g}", class_="grid"))
        parts.append(label(word, x, scale.place.foot + 14, "t tick", text_anchor="middle"))
    parts.append(tag("path", d=f"M{left:g} {scale.place.foot:g}h{width:g}", class_="rule"))
    parts.append(label(f"{title} →", left, scale.place.foot + 31, "t axis"))
    return parts


def stripes(place: Layout) -> Markup:
    """A faint line under every row, so that the eye finds its label."""
    left, _, plot, _ = place.box
    lines = [f"M{left:g} {y + place.row / 2:g}h{plot:g}" for y in place.centres]
    return tag("path", d="".join(lines), class_="grid")


def cut(rows: Sequence[Named]) -> str | None:
    """A sentence if not all rows are drawn."""
    return f"The first {MOST_ROWS} of {len(rows)} rows are drawn." if len(rows) > MOST_ROWS else None
