"""Where in the original picture what a vision tower sees comes from: resize, crop, pad and tiles undone.

Everything is in pixels of the original, with the upper left corner at (0, 0); boxes are left, top, right, bottom.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

Box = tuple[float, float, float, float]
Size = tuple[int, int]
"""Height and width, in pixels."""


@dataclass(frozen=True)
class Frame:
    """A processed picture and how its pixels map back: `original = offset + scale * processed`, per axis (y, x)."""

    size: Size
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)

    def resized(self, size: Size) -> Frame:
        """After a resize to exactly `size`."""
        scale = tuple(step * old / new for step, old, new in zip(self.scale, self.size, size, strict=True))
        return Frame(size, (scale[0], scale[1]), self.offset)

    def moved(self, top: int, left: int, size: Size) -> Frame:
        """After cutting out (or, from negative places on, padding to) `size` pixels that start at `top, left`."""
        offset = (self.offset[0] + top * self.scale[0], self.offset[1] + left * self.scale[1])
        return Frame(size, self.scale, offset)

    def box(self, top: float, left: float, bottom: float, right: float) -> Box:
        """A box of the processed picture, in the original."""
        y, x = self.offset
        return (
            x + left * self.scale[1],
            y + top * self.scale[0],
            x + right * self.scale[1],
            y + bottom * self.scale[0],
        )


def padded_to_square(frame: Frame) -> Frame:
    """The picture in the middle of a square; the odd pixel of the padding is below or on the right."""
    height, width = frame.size
    side = max(height, width)
    return frame.moved(-((side - height) // 2), -((side - width) // 2), (side, side))


def shortest_edge(size: Size, edge: int) -> Size:
    """The size whose shorter side is `edge`, the longer one cut to whole pixels."""
    height, width = size
    long = int(edge * max(height, width) / min(height, width))
    return (edge, long) if height <= width else (long, edge)


def centre_cropped(frame: Frame, size: Size) -> Frame:
    """The middle of the picture; where it is smaller than the crop, black is put around it.

    The odd pixel: a crop leaves the larger part below and on the right; padding puts the larger part above and on the
    left (`towards` zero and minus infinity, as integer division has it).
    """
    (height, width), (tall, wide) = frame.size, size
    return frame.moved((height - tall) // 2, (width - wide) // 2, size)


def fitted(size: Size, target: Size) -> Size:
    """The largest size of the same proportions within `target`, rounded up to whole pixels."""
    (height, width), (tall, wide) = size, target
    across, down = wide / width, tall / height
    if across < down:
        return min(math.ceil(height * across), tall), wide
    return tall, min(math.ceil(width * down), wide)


def best_resolution(size: Size, choices: list[Size]) -> Size:
    """Of the resolutions that a model can tile, the one that shows most of the picture and wastes least."""
    height, width = size
    best, most, least = choices[0], 0, math.inf
    for tall, wide in choices:
        scale = min(wide / width, tall / height)
        shown = min(int(width * scale) * int(height * scale), height * width)
        wasted = tall * wide - shown
        if shown > most or (shown == most and wasted < least):
            best, most, least = (tall, wide), shown, wasted
    return best


def tile_counts(size: Size, tile: Size, fewest: int, most: int) -> tuple[int, int]:
    """Rows and columns of tiles whose proportions are closest to the picture's; more tiles for large pictures."""
    height, width = size
    shapes = [
        (rows, cols)
        for cols in range(1, most + 1)
        for rows in range(1, most + 1)
        if fewest <= rows * cols <= most
    ]
    best, nearest = (1, 1), math.inf
    for rows, cols in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        distance = abs(width / height - cols / rows)
        large = height * width > 0.5 * tile[0] * tile[1] * rows * cols
        if distance < nearest or (distance == nearest and large):
            best, nearest = (rows, cols), distance
    return best


def crops_across(size: Size, smallest: int, most: int, ratio: float) -> list[Frame]:
    """Gemma's pan and scan: crops side by side along the longer side of a long picture; none for others."""
    height, width = size
    long, short = max(size), min(size)
    if long / short < ratio:
        return []
    count = min(math.floor(long / smallest), math.floor(long / short + 0.5))
    count = min(most, max(2, count))
    each = math.ceil(long / count)
    if min(each, short) < smallest:
        return []
    whole = Frame(size)
    starts = [each * i for i in range(count)]
    if width >= height:
        return [whole.moved(0, start, (height, min(each, width - start))) for start in starts]
    return [whole.moved(start, 0, (min(each, height - start), width)) for start in starts]


def unpadded(grid: Size, original: Size) -> tuple[slice, slice]:
    """The rows and columns of a feature grid that the model keeps after cutting the padding off."""
    (rows, cols), (height, width) = grid, original
    if width / height > cols / rows:
        kept = int(round(height * (cols / width), 7))
        cut = (rows - kept) // 2
        return slice(cut, rows - cut), slice(0, cols)
    kept = int(round(width * (rows / height), 7))
    cut = (cols - kept) // 2
    return slice(0, rows), slice(cut, cols - cut)


def merged(places: Int[np.ndarray, "row col"], merge: int) -> Int[np.ndarray, "merged_row merged_col member"]:
    """Patches of `merge` x `merge` neighbours as the members of one cell, row by row; an odd rest is left out."""
    rows, cols = places.shape[0] // merge, places.shape[1] // merge
    cut = places[: rows * merge, : cols * merge].reshape(rows, merge, cols, merge)
    return cut.transpose(0, 2, 1, 3).reshape(rows, cols, merge * merge)


def interpolated(places: Int[np.ndarray, "row col"], size: Size) -> Int[np.ndarray, "new_row new_col member"]:
    """The up to four patches that a bilinear shrink (without antialiasing) mixes into each cell, else -1."""
    rows, cols = (_sources(old, new) for old, new in zip(places.shape, size, strict=True))
    members = np.full((*size, 4), -1, dtype=np.int64)
    for r, ys in enumerate(rows):
        for c, xs in enumerate(cols):
            found = [places[y, x] for y in ys for x in xs]
            members[r, c, : len(found)] = found
    return members


def _sources(old: int, new: int) -> list[list[int]]:
    """Along one side, the places that each new cell is mixed from; those without weight are left out."""
    found = []
    for cell in range(new):
        place = max(0.0, (cell + 0.5) * old / new - 0.5)
        low = min(int(place), old - 1)
        both = [low, min(low + 1, old - 1)] if place > low else [low]
        found.append(list(dict.fromkeys(both)))
    return found


def window_order(rows: int, cols: int, window: int) -> Int[np.ndarray, " cell"]:
    """Cells of a grid in the order of a tower that reads them window by window: `order[i]` is the i-th cell read."""
    cells = np.arange(rows * cols).reshape(rows, cols)
    parts = [
        cells[top : top + window, left : left + window].ravel()
        for top in range(0, rows, window)
        for left in range(0, cols, window)
    ]
    return np.concatenate(parts)
