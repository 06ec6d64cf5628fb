"""Gaze shift: clamping and stretching, the layer, and the comparison with attention."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sinklens.analyzers import GazeShift, Status
from sinklens.analyzers.gaze_shift import amplification, rank_correlation, stretched
from sinklens.core.errors import UsageError

from .made_visual import LENGTH, VISUAL, received, record, trace


def test_values_are_clamped_and_stretched() -> None:
    values = np.array([*np.zeros(99), 100.0])
    clamp = values.mean() + 3 * values.std()
    assert stretched(np.array([*values[:-1], 100.0])).tolist() == [0.0] * 99 + [1.0]
    two = stretched(np.array([*np.zeros(98), 2.0, 100.0]))
    mean, spread = np.array([*np.zeros(98), 2.0, 100.0]).mean(), np.array([*np.zeros(98), 2.0, 100.0]).std()
    assert two[98] == pytest.approx(2.0 / (mean + 3 * spread))
    assert clamp < 100
    assert stretched(np.ones(4)).tolist() == [0.0] * 4
    assert amplification(np.array([0.0, 1.0])) == pytest.approx([1.0, math.e**5])


def test_rank_correlation() -> None:
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([10.0, 20, 90])) == pytest.approx(1.0)
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1.0)
    assert rank_correlation(np.ones(3), np.array([3.0, 2, 1])) == 0.0


def made(shift: np.ndarray, share: np.ndarray, layers: int = 32) -> dict[str, np.ndarray]:
    by_position = np.full((layers, LENGTH), 0.001)
    by_position[:, 1 : 1 + VISUAL] = share
    return {"gaze_shift": np.tile(shift, (layers, 1)), **received(by_position)}


def test_a_static_sink_is_not_turned_to() -> None:
    share, shift = np.linspace(0.1, 0.01, VISUAL), np.linspace(0.0, 0.05, VISUAL)
    finding = GazeShift().analyze(trace([record(0, **made(shift, share))], 32))
    assert finding.status is Status.FOUND
    assert finding.summary["layer"] == 11
    assert finding.summary["agreement"] == pytest.approx(-1.0)
    assert finding.rows[0]["position"] == VISUAL
    assert finding.rows[0]["saliency"] == pytest.approx(1.0)
    assert len(finding.figures[0].pages) == 1  # type: ignore[union-attr]
    same = GazeShift(layer=3).analyze(trace([record(0, **made(share, share))], 32))
    assert same.status is Status.NOT_FOUND
    assert same.summary["layer"] == 3


def test_reasons() -> None:
    assert GazeShift().analyze(trace([record(0)])).status is Status.NOT_APPLICABLE
    nothing = made(np.full(VISUAL, np.nan), np.ones(VISUAL))
    assert "two words" in (GazeShift().analyze(trace([record(0, **nothing)], 32)).reason or "")
    short = made(np.ones(VISUAL), np.ones(VISUAL))
    del short["gaze_shift"]  # prompts of one word have none
    assert "two words" in (GazeShift().analyze(trace([record(0, **short)], 32)).reason or "")
    with pytest.raises(UsageError, match="layer"):
        GazeShift(layer=40).analyze(trace([record(0, **made(np.ones(VISUAL), np.ones(VISUAL)))], 32))
