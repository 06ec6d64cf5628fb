"""Effective rank: the worked example, which squares would miss, and the verdict."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.analyzers import Status, VisualRank
from sinklens.analyzers.visual_rank import effective_rank

from .made_visual import record, trace


def test_the_worked_example() -> None:
    assert effective_rank(np.array([3.0, 2.0, 1.0])) == pytest.approx(2.749459, abs=5e-7)
    assert effective_rank(np.array([9.0, 4.0, 1.0])) == pytest.approx(
        2.294401, abs=5e-7
    )  # what squares would give
    assert effective_rank(np.array([1.0, 1.0, 0.0])) == pytest.approx(2.0)


def test_redundant_pictures_are_found() -> None:
    few = np.array([[10.0, 0.1, 0.1, 0.1, np.nan]])
    even = np.array([[1.0, 1.0, 1.0, 1.0, 1.0]])
    found = VisualRank().analyze(trace([record(0, visual_spectrum=few)]))
    assert found.status is Status.FOUND
    assert found.rows[0]["largest"] == 4
    assert found.rows[0]["erank"] == pytest.approx(effective_rank(few[0, :4]))
    assert VisualRank().analyze(trace([record(0, visual_spectrum=even)])).status is Status.NOT_FOUND
    both = VisualRank().analyze(trace([record(0, visual_spectrum=even), record(1, visual_spectrum=few)]))
    assert [row["prompt"] for row in both.rows] == [1, 0]
    assert both.summary["biggest"] == pytest.approx(5.0)


def test_reasons() -> None:
    assert VisualRank().analyze(trace([record(0)])).status is Status.NOT_APPLICABLE
    nothing = np.full((1, 3), np.nan)
    assert VisualRank().analyze(trace([record(0, visual_spectrum=nothing)])).status is Status.NOT_APPLICABLE
