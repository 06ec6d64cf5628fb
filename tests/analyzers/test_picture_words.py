"""The sentence under a picture: each rule, its borders, and that its numbers are counted."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.analyzers.picture_words import Sunk, count, sentence
from sinklens.analyzers.pictures import page
from sinklens.core.pictures import CellGrid
from sinklens.inputs.spans import Kind, ModalitySpans, PatchGrid, Picture
from sinklens.tracers.trace import PromptRecord

RULE = "φ ≥ τ = 20"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Sunk(0, 0, 0, 0, np.nan), "This picture has no visual tokens."),
        (Sunk(0, 25, 0, 16, 0.0), "No visual sink: none of the 25 patches has φ ≥ τ = 20."),
        (
            Sunk(3, 25, 3, 16, 0.6),
            "Attention sticks to 3 of 25 patches, all at the edge (64.0 % of all patches are); they are visual sinks "
            "(φ ≥ τ = 20). They hold 60.0 % of the attention on this picture and are 12.0 % of its patches.",
        ),
        (
            Sunk(1, 25, 0, 16, 0.6),
            "Attention sticks to 1 of 25 patches, not at the edge (64.0 % of all patches are); it is a visual sink "
            "(φ ≥ τ = 20). It holds 60.0 % of the attention on this picture and is 4.0 % of its patches.",
        ),
        (
            Sunk(4, 25, 3, 16, 0.16),
            "4 of 25 patches are visual sinks (φ ≥ τ = 20), 3 of them at the edge (64.0 % of all patches are). "
            "Attention does not stick to them: they hold 16.0 % of the attention on this picture, no more than "
            "their part of the patches (16.0 %).",
        ),
        (
            Sunk(1, 25, 1, 25, 0.05),
            "1 of 25 patches is a visual sink (φ ≥ τ = 20). Attention does not stick to it: it holds 5.0 % of the "
            "attention on this picture, little more than its part of the patches (4.0 %).",
        ),
        (
            Sunk(2, 25, 0, 16, np.nan),
            "2 of 25 patches are visual sinks (φ ≥ τ = 20), none at the edge (64.0 % of all patches are).",
        ),
    ],
)
def test_rules(found: Sunk, said: str) -> None:
    assert sentence(found, RULE) == said


def _grid(
    view: str, box: tuple[float, float, float, float], classes: np.ndarray, attention: np.ndarray
) -> CellGrid:
    return CellGrid(view, box, np.arange(classes.size).reshape(classes.shape), attention[None], classes)


def test_counts_sinks_edges_and_attention() -> None:
    classes = np.full((3, 5), 1)
    classes[0, 2] = classes[1, 2] = 0
    attention = np.full((3, 5), 0.01)
    attention[0, 2], attention[1, 2] = 0.3, np.nan
    found = count([_grid("whole", (0, 0, 50, 30), classes, attention)], sink=0, attention=0)
    assert (found.sinks, found.cells, found.edge_sinks, found.edge_cells) == (2, 15, 1, 12)
    assert found.share == pytest.approx(0.3 / (0.3 + 13 * 0.01))


def test_the_edge_of_tiles_is_that_of_the_picture() -> None:
    classes = np.full((2, 2), 0)
    left = _grid("tile", (0, 0, 10, 10), classes, np.ones((2, 2)))
    right = _grid("tile", (10, 0, 20, 10), classes, np.ones((2, 2)))
    both = count([left, right], sink=0)
    assert (both.cells, both.edge_cells) == (8, 8)
    tall = np.full((4, 4), 0)
    tiles = [_grid("tile", (x, y, x + 8, y + 8), tall, np.ones((4, 4))) for x in (0, 8) for y in (0, 8)]
    assert count(tiles, sink=0).edge_cells == 64 - 36
    assert np.isnan(both.share)


def test_cells_without_a_token_do_not_count() -> None:
    classes = np.array([[0, 1], [1, 0]])
    grid = CellGrid("whole", (0, 0, 2, 2), np.array([[3, 4], [5, -1]]), np.ones((1, 2, 2)), classes)
    found = count([grid], sink=0, attention=0)
    assert (found.sinks, found.cells) == (1, 3)
    assert found.share == pytest.approx(1 / 3)


def test_a_page_lays_values_out_by_position() -> None:
    positions = np.array([[2, 3, 4], [5, 6, -1]])
    spans = ModalitySpans(
        np.array([Kind.SYSTEM, Kind.DELIMITER, *[Kind.VISUAL] * 5, Kind.QUESTION]),
        (Picture("a.png", 30, 20, "f" * 64),),
        (PatchGrid(0, "whole", positions, (0.0, 0.0, 30.0, 20.0)),),
    )
    record = PromptRecord(4, np.arange(8), tuple("abcdefgh"), "x#4", "", {}, spans)
    built = page(record, 0, [np.arange(8) * 1.5], np.array([0, 0, 1, 0, 1, 1, 0, 1]), sentence="Seen.")
    assert (built.ref.prompt, built.ref.name, built.ref.width) == (4, "a.png", 30)
    (grid,) = built.grids
    assert np.array_equal(grid.values[0], [[3.0, 4.5, 6.0], [7.5, 9.0, np.nan]], equal_nan=True)
    assert grid.classes is not None
    assert grid.classes.tolist() == [[1, 0, 1], [1, 0, -1]]
    assert page(record, 0, []).grids[0].values.shape == (0, 2, 3)
    with pytest.raises(ValueError, match="prompt 4 has no pictures"):
        page(PromptRecord(4, np.arange(1), ("a",), "x", "", {}), 0, [])
