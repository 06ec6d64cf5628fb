"""From numbers by position to pages of a `PictureMap`: what analyzers of visual tokens hand to the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from sinklens.core.pictures import CellGrid, PicturePage, PictureRef
from sinklens.inputs.spans import ModalitySpans, PatchGrid
from sinklens.tracers.trace import PromptRecord


def reference(record: PromptRecord, picture: int) -> PictureRef:
    """The picture of a record that a page shows."""
    given = _spans(record).pictures[picture]
    return PictureRef(record.index, picture, given.name, given.width, given.height, given.sha256)


def page(
    record: PromptRecord,
    picture: int,
    values: Sequence[Float[np.ndarray, " pos"]],
    classes: Int[np.ndarray, " pos"] | None = None,
    *,
    sentence: str = "",
    bars: Sequence[tuple[str, float]] = (),
) -> PicturePage:
    """One picture of a prompt as a page.

    Args:
        values: By token position, one array per quantity of the figure; NaN is "no value".
        classes: By token position, indices into the figure's classes, -1 for none.
        sentence: What is seen; `picture_words` has the rules for visual sinks.
        bars: Parts of a whole, `(name, value)`.
    """
    grids = tuple(_cells(grid, values, classes) for grid in _spans(record).of_picture(picture))
    return PicturePage(reference(record, picture), grids, sentence, tuple(bars))


def _cells(
    grid: PatchGrid, values: Sequence[Float[np.ndarray, " pos"]], classes: Int[np.ndarray, " pos"] | None
) -> CellGrid:
    laid = [grid.spread(array) for array in values]
    stacked = np.stack(laid) if laid else np.zeros((0, *grid.shape))
    found = None if classes is None else grid.spread(classes, fill=-1).astype(np.int64)
    return CellGrid(grid.view, grid.box, grid.positions, stacked, found)


def _spans(record: PromptRecord) -> ModalitySpans:
    if record.spans is None:
        raise ValueError(f"prompt {record.index} has no pictures; ask `record.spans` first")
    return record.spans
