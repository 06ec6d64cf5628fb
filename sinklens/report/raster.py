"""Maps over pictures as plain pixels, for places that show no SVG: what the report draws, at a fixed size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8

from sinklens.core.pictures import CellClass, CellGrid, PicturePage

from . import colour
from .picture_places import Group, frame

STRENGTH, PALE = 0.72, 0.5
INKS = ((176, 74, 9), (91, 44, 131), (10, 92, 128), (29, 106, 69), (124, 83, 0), (60, 70, 80))
"""Colours of classes, as in the report."""

_EMPTY, _HATCH = np.array([250, 250, 248.0]), np.array([205, 209, 212.0])


def draw(
    page: PicturePage,
    group: Group,
    pixels: UInt8[np.ndarray, "y x 3"] | None,
    classes: Sequence[CellClass],
    side: int,
    *,
    quantity: int | None = None,
    scale: colour.Scale | None = None,
) -> UInt8[np.ndarray, "height width 3"]:
    """The group's cells over the picture.

    Args:
        pixels: A copy of the picture, of any size; None leaves its place grey.
        side: Of the longer side of the result, in px.
        quantity: What is drawn in colour, by `scale`, over the paled picture; None draws the picture itself.
    """
    place = frame(page, group, float(side))
    height, width = max(1, round(place.height)), max(1, round(place.width))
    y, x = np.mgrid[0:height, 0:width] + 0.5
    across, down = x / place.scale + place.left, y / place.scale + place.top
    canvas = np.where((((x + y) % 8) < 1.6)[..., None], _HATCH, _EMPTY)
    canvas = _picture(canvas, across, down, page, pixels, pale=quantity is not None)
    seen = np.zeros((height, width), bool)
    for grid in group.grids:
        row, col, u, v = _cells(grid, across, down)
        inside = row >= 0
        seen |= inside
        if quantity is not None and scale is not None:
            canvas = _coloured(canvas, grid, row, col, quantity, scale)
        size = min((grid.box[2] - grid.box[0]) / grid.shape[1], (grid.box[3] - grid.box[1]) / grid.shape[0])
        canvas = _marked(
            canvas, grid, (row, col, u, v), classes, size * place.scale, first=quantity is not None
        )
    inside_picture = (across >= 0) & (across < page.ref.width) & (down >= 0) & (down < page.ref.height)
    veiled = inside_picture & ~seen
    canvas[veiled] = 0.28 * canvas[veiled] + 0.72 * 255
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _picture(
    canvas: np.ndarray,
    across: np.ndarray,
    down: np.ndarray,
    page: PicturePage,
    pixels: np.ndarray | None,
    *,
    pale: bool,
) -> np.ndarray:
    inside = (across >= 0) & (across < page.ref.width) & (down >= 0) & (down < page.ref.height)
    if pixels is None:
        canvas[inside] = 235
        return canvas
    rows = np.minimum((down[inside] / page.ref.height * pixels.shape[0]).astype(int), pixels.shape[0] - 1)
    cols = np.minimum((across[inside] / page.ref.width * pixels.shape[1]).astype(int), pixels.shape[1] - 1)
    shown = pixels[rows, cols].astype(np.float64)
    if pale:
        grey = shown @ np.array([0.299, 0.587, 0.114])
        shown = np.repeat((255 - PALE * (255 - grey))[:, None], 3, axis=1)
    canvas[inside] = shown
    return canvas


def _cells(
    grid: CellGrid, across: Float[np.ndarray, "y x"], down: Float[np.ndarray, "y x"]
) -> tuple[Int[np.ndarray, "y x"], Int[np.ndarray, "y x"], np.ndarray, np.ndarray]:
    """Row and column of each pixel (-1 outside the grid), and its place inside the cell, 0 to 1 both ways."""
    left, top, right, bottom = grid.box
    rows, cols = grid.shape
    col, row = (across - left) / (right - left) * cols, (down - top) / (bottom - top) * rows
    inside = (col >= 0) & (col < cols) & (row >= 0) & (row < rows)
    found = [np.where(inside, np.floor(part), -1).astype(int) for part in (row, col)]
    return found[0], found[1], col % 1, row % 1


def _coloured(
    canvas: np.ndarray, grid: CellGrid, row: np.ndarray, col: np.ndarray, quantity: int, scale: colour.Scale
) -> np.ndarray:
    levels = scale.levels(np.asarray(grid.values[quantity], dtype=float))
    level = np.where(row >= 0, levels[np.maximum(row, 0), np.maximum(col, 0)], -1)
    known = level >= 0
    ramp = np.array(scale.colours(light=True), dtype=float)
    canvas[known] = STRENGTH * ramp[level[known]] + (1 - STRENGTH) * canvas[known]
    return canvas


def _marked(
    canvas: np.ndarray,
    grid: CellGrid,
    places: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    classes: Sequence[CellClass],
    size: float,
    *,
    first: bool,
) -> np.ndarray:
    """Marks of the classes, or of the first alone; `size` is that of a cell in px."""
    if grid.classes is None:
        return canvas
    row, col, u, v = places
    kinds = np.where(row >= 0, np.asarray(grid.classes)[np.maximum(row, 0), np.maximum(col, 0)], -1)
    line = max(1.2, min(2.6, 0.11 * size)) / size
    for index, class_ in enumerate(classes[:1] if first else classes):
        away = _distance(class_.mark, u - 0.5, v - 0.5)
        here = kinds == index
        canvas[here & (away < 0.5 * line + 1 / size)] = 255
        canvas[here & (away < 0.5 * line)] = INKS[index % len(INKS)]
    return canvas


def _distance(mark: str, u: np.ndarray, v: np.ndarray, r: float = 0.32) -> np.ndarray:
    """Of points from the line of a mark around the origin, in units of a cell."""
    if mark == "ring":
        return np.abs(np.hypot(u, v) - r)
    if mark == "dot":
        return np.maximum(np.hypot(u, v) - 0.06, 0)
    if mark == "square":
        return np.abs(np.maximum(np.abs(u), np.abs(v)) - r)
    if mark == "diamond":
        return np.abs(np.abs(u) + np.abs(v) - r) / np.sqrt(2)
    if mark == "cross":
        u, v = (u + v) / np.sqrt(2), (u - v) / np.sqrt(2)
        r *= np.sqrt(2)
    beyond = np.maximum(np.maximum(np.abs(u), np.abs(v)) - r, 0)
    return np.maximum(np.minimum(np.abs(u), np.abs(v)), beyond)
