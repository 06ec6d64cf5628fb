"""How much of each token's cell shows an object, from masks of the original pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from sinklens.core.errors import DataError

from ..spans import ModalitySpans
from .pictures import Decoded, Reference

Mask = Bool[np.ndarray, "height width"]


def read_mask(reference: Reference | None, picture: Decoded) -> Mask | None:
    """A mask: pixels that are not black show an object.

    Raises:
        DataError: It has another size than its picture.
    """
    if reference is None:
        return None
    decoded = reference.open()
    if decoded.pixels.shape != picture.pixels.shape:
        (tall, wide), (height, width) = decoded.pixels.shape[:2], picture.pixels.shape[:2]
        raise DataError(
            f"The mask {decoded.name!r} has {wide} x {tall} pixels, its picture {picture.name!r} {width} x {height}.",
            hint="A mask has the size of its picture, after the picture's EXIF rotation.",
        )
    return decoded.pixels.max(-1) > 0


def object_shares(spans: ModalitySpans, masks: Sequence[Mask | None]) -> Float[np.ndarray, " pos"] | None:
    """Per token the part of its cell, as far as it lies in the picture, that shows an object; else NaN.

    None if no picture has a mask.
    """
    if all(mask is None for mask in masks):
        return None
    shares = np.full(len(spans.kinds), np.nan, dtype=np.float32)
    for grid in spans.grids:
        mask = masks[grid.picture]
        if mask is not None:
            rows, cols = grid.shape
            left, top, right, bottom = grid.box
            covered = cell_means(mask, np.linspace(top, bottom, rows + 1), np.linspace(left, right, cols + 1))
            shares[grid.positions[grid.positions >= 0]] = covered[grid.positions >= 0]
    return shares


def cell_means(
    mask: Mask, down: Float[np.ndarray, " edge"], across: Float[np.ndarray, " edge"]
) -> Float[np.ndarray, "row col"]:
    """Mean of a mask in the cells between edges, exact for edges inside pixels; NaN for cells outside of it."""
    height, width = mask.shape
    down, across = down.clip(0, height), across.clip(0, width)
    total = np.zeros((height + 1, width + 1))
    total[1:, 1:] = mask.cumsum(0, dtype=np.float64).cumsum(1)
    # The integral of a picture of constant pixels is linear between their corners.
    rows = np.stack([np.interp(down, np.arange(height + 1), column) for column in total.T], axis=1)
    sums = np.stack([np.interp(across, np.arange(width + 1), row) for row in rows])
    inside = np.diff(sums, axis=0)
    inside = np.diff(inside, axis=1)
    area = np.outer(np.diff(down), np.diff(across))
    return np.divide(inside, area, out=np.full_like(area, np.nan), where=area > 0)
