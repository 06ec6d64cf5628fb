"""The oracle of the geometry: a spot painted into the original is found again in the token that is said to show it."""

# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportOptionalOperand=false

from __future__ import annotations

import math

import numpy as np
import pytest

from sinklens.inputs.spans import Kind, PatchGrid
from tests.inputs.vision.painting import Bench, noise
from tests.vlms import EVERY

SIZES = [(30, 50), (70, 33), (41, 41), (23, 120)]
"""Heights and widths: wide, tall, square, very wide."""


@pytest.fixture(scope="module", params=list(EVERY))
def bench(request):
    return Bench.of(request.param)


def spot_for(grid: PatchGrid, row: int, col: int, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """Left, top, width and height of a spot of whole pixels of a cell, None if it is not inside the picture."""
    left, top, right, bottom = grid.cell_box(row, col)
    inset_x, inset_y = (math.floor(length / 4) for length in (right - left, bottom - top))
    x0, x1 = math.ceil(left - 1e-6) + inset_x, math.floor(right + 1e-6) - inset_x
    y0, y1 = math.ceil(top - 1e-6) + inset_y, math.floor(bottom + 1e-6) - inset_y
    if x1 <= x0 or y1 <= y0 or x0 < 0 or y0 < 0 or x1 > size[1] or y1 > size[0]:
        return None
    return x0, y0, x1 - x0, y1 - y0


def cell_at(grid: PatchGrid, x: float, y: float) -> tuple[int, int] | None:
    left, top, right, bottom = grid.box
    rows, cols = grid.shape
    col, row = int(cols * (x - left) // (right - left)), int(rows * (y - top) // (bottom - top))
    return (row, col) if 0 <= row < rows and 0 <= col < cols else None


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_a_painted_spot_is_found_in_its_token(bench, size):
    """Some cells of every grid: the changed token of each grid is the one whose box holds the spot."""
    pictures = [noise(*size)]
    prompt = bench.load(pictures)
    rng = np.random.default_rng(size[0])
    tried = 0
    for grid in prompt.visual.spans.grids:
        cells = [(row, col) for row in range(grid.shape[0]) for col in range(grid.shape[1])]
        spots = [(cell, spot) for cell in cells if (spot := spot_for(grid, *cell, size)) is not None]
        for index in rng.permutation(len(spots))[:3]:
            (row, col), (left, top, wide, high) = spots[index]
            tried += 1
            painted = bench.paint(pictures, 0, left, top, wide, high)
            changes = painted.tokens[grid.positions]
            assert np.unravel_index(changes.argmax(), changes.shape) == (row, col)
            assert painted.tokens[~prompt.visual.spans.visual].max() == 0
            strongest = painted.patches[grid.members[grid.members >= 0]].max()
            members = grid.members[row, col]
            assert painted.patches[members[members >= 0]].max() == strongest
    assert tried >= 2


ODD = [(1, 1), (1, 40), (2, 3), (5, 300), (400, 3), (61, 517), (32, 32)]
"""One pixel, fewer pixels than patches, extreme proportions, and much larger than the model's input."""


@pytest.mark.parametrize("size", ODD, ids=lambda size: f"{size[0]}x{size[1]}")
def test_odd_pictures_are_laid_out_whole_and_painted_spots_found(bench, size):
    pictures = [noise(*size)]
    prompt = bench.load(pictures)
    spans = prompt.visual.spans
    laid = np.concatenate([grid.positions.ravel() for grid in spans.grids])
    np.testing.assert_array_equal(np.sort(laid), np.flatnonzero(spans.visual))
    for grid in spans.grids:
        cells = [(row, col) for row in range(grid.shape[0]) for col in range(grid.shape[1])]
        spots = [(cell, spot) for cell in cells if (spot := spot_for(grid, *cell, size)) is not None]
        for cell, spot in spots[len(spots) // 2 :][:1]:
            changes = bench.paint(pictures, 0, *spot).tokens[grid.positions]
            assert np.unravel_index(changes.argmax(), changes.shape) == cell


def test_a_spot_in_the_second_of_three_pictures(bench):
    """Pictures of different shapes: nothing of the others changes."""
    pictures = [noise(30, 50, 1), noise(70, 33, 2), noise(25, 25, 3)]
    prompt = bench.load(pictures)
    spans = prompt.visual.spans
    assert [grid.picture for grid in spans.grids] == sorted(grid.picture for grid in spans.grids)
    grid = spans.of_picture(1)[-1]
    row, col = grid.shape[0] // 2, grid.shape[1] // 2
    spot = spot_for(grid, row, col, (70, 33))
    assert spot is not None
    painted = bench.paint(pictures, 1, *spot)
    changed = painted.tokens > 0
    mine = np.isin(
        np.arange(len(changed)), np.concatenate([g.positions.ravel() for g in spans.of_picture(1)])
    )
    assert changed.any()
    assert not (changed & ~mine).any()
    changes = painted.tokens[grid.positions]
    assert np.unravel_index(changes.argmax(), changes.shape) == (row, col)
    members = grid.members[row, col]
    assert (
        painted.patches[members[members >= 0]].max() == painted.patches[grid.members[grid.members >= 0]].max()
    )


def test_the_members_of_a_cell_lie_row_by_row(bench):
    """A spot in the upper right patch of a merged cell changes that member most."""
    size = (64, 96)
    pictures = [noise(*size)]
    grid = bench.load(pictures).visual.spans.grids[0]
    count = grid.members.shape[2]
    side = round(count**0.5)
    if side == 1 or side * side != count:
        pytest.skip("cells are single patches")
    left, top, right, bottom = grid.cell_box(0, 1)
    wide, high = (right - left) / side, (bottom - top) / side
    x, y = left + (side - 1) * wide, top
    painted = bench.paint(pictures, 0, round(x), round(y), max(1, round(wide)), max(1, round(high)))
    assert painted.patches.argmax() == grid.members[0, 1, side - 1]


def test_every_token_is_accounted_for(bench):
    prompt = bench.load([noise(30, 50), noise(70, 33)])
    spans = prompt.visual.spans
    token = [position for position, kind in enumerate(spans.kinds) if kind == Kind.VISUAL]
    laid = np.concatenate([grid.positions.ravel() for grid in spans.grids])
    assert sorted(laid.tolist()) == token
    assert len(spans.kinds) == len(prompt)
    assert prompt.pieces[-3:][0] != "<image>"
