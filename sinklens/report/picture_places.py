"""Where things stand over a picture: which grids share a drawing, and how much of picture and grid fall apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sinklens.core.pictures import CellGrid, PicturePage

from .numbers import percent

_VIEWS = {
    "whole": "The whole picture",
    "thumbnail": "The whole picture, small",
    "tile": "Tiles",
    "detail": "A finer look",
}
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Group:
    """Grids that are drawn together: side by side, never over each other.

    Attributes:
        places: Their places in the page.
        title: What they are, with their size.
    """

    places: tuple[int, ...]
    grids: tuple[CellGrid, ...]
    title: str

    @property
    def boxes(self) -> list[Box]:
        return [grid.box for grid in self.grids]


@dataclass(frozen=True)
class Frame:
    """From pixels of the original to those of a drawing: `(x - left) * scale`."""

    left: float
    top: float
    scale: float
    width: float
    height: float

    def box(self, box: Box) -> Box:
        """Left, top, width, height in the drawing."""
        left, top, right, bottom = box
        return (
            (left - self.left) * self.scale,
            (top - self.top) * self.scale,
            (right - left) * self.scale,
            (bottom - top) * self.scale,
        )


def groups(page: PicturePage) -> list[Group]:
    """Each view by itself; the tiles of a picture together unless they overlap."""
    found: list[Group] = []
    tiles = [(i, grid) for i, grid in enumerate(page.grids) if grid.view == "tile"]
    apart = not _overlap([grid.box for _, grid in tiles])
    for i, grid in enumerate(page.grids):
        if grid.view != "tile" or not apart:
            found.append(Group((i,), (grid,), _title([grid])))
        elif i == tiles[0][0]:
            grids = tuple(grid for _, grid in tiles)
            found.append(Group(tuple(i for i, _ in tiles), grids, _title(grids)))
    return found


def frame(page: PicturePage, group: Group, side: float) -> Frame:
    """Room for the picture and all of the group's cells, in a square of `side`."""
    whole = [(0.0, 0.0, float(page.ref.width), float(page.ref.height)), *group.boxes]
    left, top = min(box[0] for box in whole), min(box[1] for box in whole)
    right, bottom = max(box[2] for box in whole), max(box[3] for box in whole)
    scale = side / max(right - left, bottom - top)
    return Frame(left, top, scale, (right - left) * scale, (bottom - top) * scale)


def unseen(page: PicturePage, group: Group) -> tuple[float, float]:
    """Share of the picture outside the group's grids, and of the grids outside the picture."""
    width, height = float(page.ref.width), float(page.ref.height)
    inside = sum(area(meet(box, (0.0, 0.0, width, height))) for box in group.boxes)
    covered = sum(area(box) for box in group.boxes)
    return max(0.0, 1 - inside / (width * height)), max(0.0, 1 - inside / covered) if covered else 0.0


def notes(page: PicturePage, group: Group) -> list[str]:
    """Sentences about crop, padding and cells without a token, where there are any."""
    cut, padding = unseen(page, group)
    said = []
    if cut > 1e-6:
        said.append(
            f"Dimmed: {percent(100 * cut)} % of the picture lies outside the patches and is not seen here."
        )
    if padding > 1e-6:
        said.append(
            f"Hatched: {percent(100 * padding)} % of the patches' area is padding outside the picture."
        )
    empty = sum(int((np.asarray(grid.positions) < 0).sum()) for grid in group.grids)
    if empty:
        said.append(f"{empty} cell{'s have' if empty > 1 else ' has'} no token.")
    return said


def _title(grids: Sequence[CellGrid]) -> str:
    name = _VIEWS.get(grids[0].view, grids[0].view.capitalize())
    sizes = dict.fromkeys(f"{grid.shape[0]} × {grid.shape[1]}" for grid in grids)
    if len(grids) == 1:
        return f"{name}: {next(iter(sizes))} patches"
    return f"{len(grids)} tiles of {' and '.join(sizes)} patches"


def _overlap(boxes: Sequence[Box]) -> bool:
    pairs = ((a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    return any(area(meet(a, b)) > 1e-6 * min(area(a), area(b)) for a, b in pairs)


def meet(a: Box, b: Box) -> Box:
    """What two boxes share; its area is 0 if they share nothing."""
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


def area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
