"""The sentence under a picture with visual sinks. Every number in it is counted on that picture; no claim without one.

Rules, in order: no sink; sinks that hold no more of the picture's attention than their number; sinks that hold more.
Where they stand is said beside how many of all cells stand there: most cells of a small grid are at its edge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sinklens.core.pictures import CellGrid

STICKS = 1.5
"""Sinks must hold this many times their number's share of the attention before a sentence says that it sticks."""


@dataclass(frozen=True)
class Sunk:
    """Counts over all cells with a token.

    Attributes:
        sinks, cells: Numbers of cells.
        edge_sinks, edge_cells: ... of those at the outer edge of the outermost cells.
        share: Of the attention on the picture that the sinks hold; NaN if it is not known.
    """

    sinks: int
    cells: int
    edge_sinks: int
    edge_cells: int
    share: float


def count(grids: Sequence[CellGrid], sink: int, attention: int | None = None) -> Sunk:
    """Counts the sinks of a picture.

    Args:
        sink: Index of the class that is a sink.
        attention: Index of the quantity that is the attention received, summed over cells; None if there is none.
    """
    sinks = cells = edge_sinks = edge_cells = 0
    held = total = 0.0
    for grid, edge in zip(grids, _edges(grids), strict=True):
        there = np.asarray(grid.positions) >= 0
        chosen = np.zeros_like(there) if grid.classes is None else there & (np.asarray(grid.classes) == sink)
        sinks, cells = sinks + int(chosen.sum()), cells + int(there.sum())
        edge_sinks, edge_cells = (
            edge_sinks + int((chosen & edge).sum()),
            edge_cells + int((there & edge).sum()),
        )
        if attention is not None:
            held += float(np.nansum(grid.values[attention][chosen]))
            total += float(np.nansum(grid.values[attention][there]))
    return Sunk(sinks, cells, edge_sinks, edge_cells, held / total if total > 0 else math.nan)


def _edges(grids: Sequence[CellGrid]) -> list[np.ndarray]:
    """Cells at the outer edge; views of the same picture are each their own, tiles share the picture's."""
    found = []
    for grid in grids:
        beside = [other.box for other in grids if other.view == grid.view]
        left, top = min(box[0] for box in beside), min(box[1] for box in beside)
        right, bottom = max(box[2] for box in beside), max(box[3] for box in beside)
        edge = np.zeros(grid.shape, dtype=bool)
        slack = 1e-6 * max(right - left, bottom - top)
        edge[0] |= grid.box[1] <= top + slack
        edge[-1] |= grid.box[3] >= bottom - slack
        edge[:, 0] |= grid.box[0] <= left + slack
        edge[:, -1] |= grid.box[2] >= right - slack
        found.append(edge)
    return found


def sentence(found: Sunk, rule: str) -> str:
    """What is seen.

    Args:
        rule: What makes a visual sink, as a condition: `φ ≥ τ = 20`.
    """
    if found.cells == 0:
        return "This picture has no visual tokens."
    if found.sinks == 0:
        return f"No visual sink: none of the {found.cells} patches has {rule}."
    many, part = found.sinks > 1, found.sinks / found.cells
    patches = f"{found.sinks} of {found.cells} patches"
    sinks = f"{'are visual sinks' if many else 'is a visual sink'} ({rule})"
    they, them, hold = ("they", "them", "hold") if many else ("it", "it", "holds")
    if math.isnan(found.share):
        return f"{patches} {sinks}{_where(found)}."
    held = f"{_percent(found.share)} of the attention on this picture"
    if found.share >= STICKS * part:
        size = f"{'are' if many else 'is'} {_percent(part)} of its patches"
        stuck = f"Attention sticks to {patches}{_where(found)}; {they} {sinks}."
        return f"{stuck} {they.capitalize()} {hold} {held} and {size}."
    less = "no more than" if found.share <= part else "little more than"
    return (
        f"{patches} {sinks}{_where(found)}. Attention does not stick to {them}: {they} {hold} {held}, "
        f"{less} {'their' if many else 'its'} part of the patches ({_percent(part)})."
    )


def _where(found: Sunk) -> str:
    """At the edge or not, beside how many patches are; nothing if every patch is at the edge or none is."""
    if found.edge_cells in (0, found.cells):
        return ""
    base = f"{_percent(found.edge_cells / found.cells)} of all patches are"
    if found.edge_sinks == found.sinks:
        return f", {'all ' if found.sinks > 1 else ''}at the edge ({base})"
    if found.edge_sinks == 0:
        return f", {'none' if found.sinks > 1 else 'not'} at the edge ({base})"
    return f", {found.edge_sinks} of them at the edge ({base})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
