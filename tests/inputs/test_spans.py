"""Modality spans: what a saved run carries comes back whole, and cells find their place in the picture."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sinklens.inputs.spans import Kind, ModalitySpans, PatchGrid, Picture


@pytest.fixture
def spans() -> ModalitySpans:
    """BOS, a picture of 2 x 3 tokens (one cell of which has none), a row mark, and a question of two tokens."""
    grid = PatchGrid(
        0,
        "whole",
        np.array([[1, 2, 3], [4, 5, -1]]),
        (-10.0, 0.0, 50.0, 40.0),
        np.arange(24).reshape(2, 3, 4),
    )
    kinds = [Kind.SYSTEM, *[Kind.VISUAL] * 5, Kind.DELIMITER, Kind.QUESTION, Kind.QUESTION]
    return ModalitySpans(np.array(kinds), (Picture("cat.png", 40, 40, "00"),), (grid,))


def test_spans_survive_json(spans: ModalitySpans) -> None:
    again = ModalitySpans.from_json(json.loads(json.dumps(spans.to_json())))
    assert again.to_json() == spans.to_json()
    assert again.pictures == spans.pictures
    assert again.grids[0].box == spans.grids[0].box


def test_kinds_and_cells(spans: ModalitySpans) -> None:
    assert spans.visual.nonzero()[0].tolist() == [1, 2, 3, 4, 5]
    assert spans.is_(Kind.SYSTEM, Kind.QUESTION).sum() == 3
    found = spans.cell_of(5)
    assert found is not None
    assert found[1:] == (1, 1)
    assert spans.cell_of(0) is None
    assert spans.of_picture(1) == ()


def test_cells_divide_the_box_evenly(spans: ModalitySpans) -> None:
    grid = spans.grids[0]
    assert grid.cell_box(0, 0) == (-10.0, 0.0, 10.0, 20.0)
    assert grid.cell_box(1, 2) == (30.0, 20.0, 50.0, 40.0)


def test_values_are_spread_over_the_grid(spans: ModalitySpans) -> None:
    laid = spans.grids[0].spread(np.arange(9.0) * 10)
    assert laid[0].tolist() == [10, 20, 30]
    assert np.isnan(laid[1, 2])
