"""Marks of classes on cells: a shape and a colour each, with a light halo, so that they stand out on any picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool
from markupsafe import Markup

from sinklens.core.pictures import CellClass, CellGrid

from .picture_places import Frame
from .svg import tag

Shape = Callable[[float, float, float], str]

SHAPES: dict[str, Shape] = {
    "ring": lambda x, y, r: f"M{x - r:.1f} {y:.1f}{_half(r, 1)}{_half(r, -1)}z",
    "cross": lambda x, y, r: (
        f"M{x - r:.1f} {y - r:.1f}l{2 * r:.1f} {2 * r:.1f}m0 {-2 * r:.1f}l{-2 * r:.1f} {2 * r:.1f}"
    ),
    "dot": lambda x, y, r: f"M{x:.1f} {y:.1f}h0",
    "square": lambda x, y, r: f"M{x - r:.1f} {y - r:.1f}h{2 * r:.1f}v{2 * r:.1f}h{-2 * r:.1f}z",
    "diamond": lambda x, y, r: f"M{x:.1f} {y - r:.1f}l{r:.1f} {r:.1f}l{-r:.1f} {r:.1f}l{-r:.1f} {-r:.1f}z",
    "plus": lambda x, y, r: f"M{x - r:.1f} {y:.1f}h{2 * r:.1f}m{-r:.1f} {-r:.1f}v{2 * r:.1f}",
}
"""Path of a shape around a point; the dot is a line of no length with a round end."""


def _half(r: float, way: int) -> str:
    """Half a circle; its ends lie exactly two of the written radii apart, else it would be drawn as an egg."""
    written = round(r, 1)
    return f"a{written:g} {written:g} 0 0 0 {way * 2 * written:g} 0"


def marks(
    frame: Frame, grids: Sequence[CellGrid], classes: Sequence[CellClass], name: str, only: int | None = None
) -> Markup:
    """The classes of cells.

    Args:
        name: Begins the ids of the paths, which `again` draws once more elsewhere.
        only: Draw this class alone.
    """
    drawn = []
    for index, class_ in enumerate(classes):
        if only is not None and index != only:
            continue
        shape, commands = SHAPES.get(class_.mark, SHAPES["plus"]), []
        for grid in grids:
            if grid.classes is None:
                continue
            x, y, radius = _centres(frame, grid, np.asarray(grid.classes) == index)
            commands += [shape(a, b, radius) for a, b in zip(x, y, strict=True)]
        if commands:
            path = tag("path", id=f"{name}-{index}", d="".join(commands))
            drawn.append(_class(index, class_.mark, path, _radius(frame, grids), f"{name}-{index}"))
    return Markup("").join(drawn)


def again(
    frame: Frame, grids: Sequence[CellGrid], classes: Sequence[CellClass], name: str, index: int
) -> Markup:
    """One class once more, from the paths that `marks` has drawn under this name; nothing if no cell has it."""
    held = [np.asarray(grid.classes) for grid in grids if grid.classes is not None]
    if not any((kinds == index).any() for kinds in held):
        return Markup("")
    use = tag("use", href=f"#{name}-{index}")
    return _class(index, classes[index].mark, use, _radius(frame, grids), f"{name}-{index}")


def legend_mark(index: int, mark: str, size: float = 16.0) -> Markup:
    """The mark of a class alone, for the legend."""
    path = tag("path", d=SHAPES.get(mark, SHAPES["plus"])(size / 2, size / 2, 0.32 * size))
    return tag(
        "svg",
        _class(index, mark, path, 0.32 * size, None),
        viewBox=f"0 0 {size:g} {size:g}",
        width=size,
        height=size,
        aria_hidden="true",
        class_="legend-mark",
    )


def _class(index: int, mark: str, path: Markup, radius: float, name: str | None) -> Markup:
    """The halo and the mark on it; a named path is written once and used twice."""
    line = max(0.8, min(2.4, 0.34 * radius)) if mark != "dot" else max(1.2, min(5.0, 0.6 * radius))
    halo = line + max(0.6, min(2.4, 0.34 * radius))
    second = path if name is None else tag("use", href=f"#{name}")
    return tag(
        "g",
        tag("g", path, class_="cell-halo", stroke_width=halo),
        tag("g", second, class_="cell-mark", stroke_width=line),
        class_=f"cells-of c{index % 6}",
    )


def _radius(frame: Frame, grids: Sequence[CellGrid]) -> float:
    """Of marks in the smallest cells."""
    return min((_centres(frame, grid, np.zeros(grid.shape, bool))[2] for grid in grids), default=1.0)


def _centres(
    frame: Frame, grid: CellGrid, chosen: Bool[np.ndarray, "row col"]
) -> tuple[list[float], list[float], float]:
    """Middles of the chosen cells in the drawing, and the radius of marks in them."""
    left, top, width, height = frame.box(grid.box)
    rows, cols = grid.shape
    row, col = np.nonzero(chosen)
    x = left + (col + 0.5) * width / cols
    y = top + (row + 0.5) * height / rows
    return x.tolist(), y.tolist(), max(1.0, min(13.0, 0.32 * min(width / cols, height / rows)))
