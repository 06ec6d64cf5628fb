"""Figures as the page shows them: drawn, named, and with the values that travel in the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from sinklens.core.figures import Figure, Heatmap, Intervals, Lines, PictureMap, Timeline

from . import embed, heatmap, intervals, lines, pictures, samples, text, timeline
from .album import Album

_HALF_WIDTH, _FULL_WIDTH, _WIDE_COLUMNS, _WIDE_WORDS = 578, 1180, 64, 40


@dataclass(frozen=True)
class FigureView:
    """A figure as the template prints it.

    Attributes:
        svg: Drawings, one or (for `Samples`) two; empty if there is nothing to draw.
        notes: Sentences about the drawing.
        wide: Whether it takes the whole width of the page.
        slider: For `Samples`: number of thresholds, index of the finding's own, the sentence at it.
        pages: For `PictureMap`: one per picture; then `svg` is empty.
    """

    id: str
    title: str
    caption: str
    unit: str
    svg: tuple[Markup, ...]
    notes: tuple[str, ...]
    slider: dict[str, Any] | None = None
    wide: bool = False
    pages: tuple[pictures.PageView, ...] = ()


def draw_all(
    section: str,
    figures: Sequence[Figure],
    data: dict[str, Any],
    album: Album | None = None,
    **of_lines: Any,
) -> list[FigureView]:
    """Draws a section's figures and adds their values to `data` under the figure's id, `section--key`.

    Args:
        album: The report's pictures; those that are drawn are added to its definitions.
        of_lines: Passed on to `lines.draw` for curves.
    """
    views, taken = [], set()
    for figure in figures:
        identifier = f"{section}--{text.slug(figure.key)}"
        while identifier in taken:
            identifier += "-2"
        taken.add(identifier)
        values, view = draw(figure, identifier, album, **of_lines)
        views.append(view)
        if values is not None:
            data[identifier] = values
    return views


def draw(
    figure: Figure, identifier: str, album: Album | None = None, **of_lines: Any
) -> tuple[dict[str, Any] | None, FigureView]:
    """The values that are embedded, if any, and the drawing."""
    parts: dict[str, Any] = {"id": identifier, "title": figure.title, "caption": figure.caption}
    if isinstance(figure, Lines):
        drawing = lines.draw(figure, figure_id=identifier, **of_lines)
        return embed.lines(figure), FigureView(**parts, unit="", svg=svgs(drawing), notes=drawing.notes)
    if isinstance(figure, PictureMap):
        values, pages, notes = pictures.draw(figure, identifier, album or Album(None))
        return values, FigureView(**parts, unit="", svg=(), notes=notes, wide=True, pages=pages)
    if isinstance(figure, Intervals | Timeline):
        wide = len(figure.rows) > 0 and max(len(row.label + row.note) for row in figure.rows) > _WIDE_WORDS
        width = _FULL_WIDTH if wide else _HALF_WIDTH
        if isinstance(figure, Intervals):
            values, drawing = embed.intervals(figure), intervals.draw(figure, width=width)
        else:
            values, drawing = embed.timeline(figure), timeline.draw(figure, width=width)
        return values, FigureView(**parts, unit="", svg=svgs(drawing), notes=drawing.notes, wide=wide)
    if isinstance(figure, Heatmap):
        wide = np.ndim(figure.values) == 2 and np.shape(figure.values)[1] > _WIDE_COLUMNS
        drawing = heatmap.draw(figure, figure_id=identifier, width=_FULL_WIDTH if wide else _HALF_WIDTH)
        view = FigureView(**parts, unit=figure.unit, svg=svgs(drawing), notes=drawing.notes, wide=wide)
        return embed.heatmap(figure), view
    if np.ndim(figure.values) != 3 or not np.size(figure.values) or not np.isfinite(figure.values).any():
        return None, FigureView(**parts, unit="", svg=(), notes=("There are no values to draw.",))
    counts = samples.count(figure)
    drawings = samples.draw(figure, counts, figure_id=identifier)
    own = int(np.argmin(np.abs(counts.thresholds - figure.threshold)))
    slider = {"last": len(counts.thresholds) - 1, "own": own, "sentence": samples.sentence(figure, counts)}
    notes = tuple(note for drawing in drawings for note in drawing.notes)
    view = FigureView(**parts, unit="% of prompts", svg=svgs(*drawings), notes=notes, slider=slider)
    return embed.samples(figure, counts), view


def svgs(*drawings: heatmap.Drawing) -> tuple[Markup, ...]:
    return tuple(drawing.svg for drawing in drawings if drawing.svg is not None)
