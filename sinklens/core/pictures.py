"""Maps over pictures as data: numbers and classes per visual token, laid out where the token looks.

Places are pixels of the original picture, so that crop, padding, tiles and merged patches need no second thought: a
cell is where its grid's box says it is, even if that is partly outside the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MARKS = ("ring", "cross", "dot", "square", "diamond", "plus")
"""Shapes of classes; each class also has its own colour, so that neither alone has to tell them apart."""


@dataclass(frozen=True)
class PictureRef:
    """Which picture a page shows.

    Attributes:
        prompt: Index of the prompt, as in its record.
        picture: Which picture of that prompt.
        name: As it was given; never a path of the machine.
        width, height: Of the original, in pixels.
        sha256: Of the decoded RGB pixels; the small copies that a report gets are found by it.
    """

    prompt: int
    picture: int
    name: str
    width: int
    height: int
    sha256: str


@dataclass(frozen=True)
class CellClass:
    """A class of visual tokens, for instance "sink".

    Attributes:
        mark: One of `MARKS`.
        meaning: The rule in a few words, for the legend.
    """

    name: str
    mark: str
    meaning: str = ""


@dataclass(frozen=True)
class Quantity:
    """A number per cell, drawn as one map.

    Attributes:
        limits: Colour limits, or None for robust ones over all pages.
        scale: Quantities with the same non-empty scale share colour limits and can be flipped in place, for instance
            attention before and after.
        threshold: Where a class begins; a histogram with this line stands beside the map. None for none.
        threshold_label: How the line is called, for instance `τ`.
        drawn: False only reads the number out with its cell.
    """

    key: str
    title: str
    unit: str
    log: bool = False
    limits: tuple[float, float] | None = None
    scale: str = ""
    threshold: float | None = None
    threshold_label: str = "threshold"
    drawn: bool = True


@dataclass(frozen=True, eq=False)
class CellGrid:
    """One grid of cells over a picture.

    Attributes:
        view: `whole`, `detail`, `tile` or `thumbnail`, as its `PatchGrid` says.
        box: Left, top, right, bottom in pixels of the original picture.
        positions: `[row, col]`, the token of each cell; -1 where a cell has none.
        values: `[quantity, row, col]`, in the order of the figure's quantities; NaN is "no value".
        classes: `[row, col]`, indices into the figure's classes, -1 for none of them; None without classes.
    """

    view: str
    box: tuple[float, float, float, float]
    positions: np.ndarray
    values: np.ndarray
    classes: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = np.shape(self.positions)
        return int(rows), int(cols)


@dataclass(frozen=True, eq=False)
class PicturePage:
    """One picture with its grids.

    Attributes:
        sentence: What is seen, with numbers of this picture alone.
        bars: Parts of a whole `(name, value)`, for instance where the attention of the question goes.
    """

    ref: PictureRef
    grids: tuple[CellGrid, ...]
    sentence: str = ""
    bars: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, eq=False)
class PictureMap:
    """Pictures with what was measured on them, one page per picture.

    Attributes:
        caption: The reduction in words: which layers, heads and queries, how averaged.
        bars_title, bars_unit: Of the pages' bars.
    """

    key: str
    title: str
    caption: str
    pages: tuple[PicturePage, ...]
    quantities: tuple[Quantity, ...]
    classes: tuple[CellClass, ...] = ()
    bars_title: str = ""
    bars_unit: str = "share"
