"""Matrix entropy by layer: the collapse, both recipes, and where there is none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sinklens.analyzers import MatrixEntropy, Status
from sinklens.analyzers.matrix_entropy import collapse
from sinklens.core.errors import UsageError

from .made_visual import VISUAL, record, trace


def made(code: list[float], paper: list[float]) -> np.ndarray:
    return np.repeat(np.stack([code, paper], 1)[..., None], VISUAL, axis=2)


def test_the_largest_fall_is_the_collapse() -> None:
    assert collapse(np.array([0.9, 0.8, 0.4, 0.35])) == (2, pytest.approx(0.5))
    assert collapse(np.array([0.1, 0.2, 0.3])) == (0, 0.0)
    assert collapse(np.array([0.5])) == (0, 0.0)
    records = [record(i, query_entropy=made([9.0, 8.9, 8.8, 2.2], [0.9, 0.8, 0.4, 0.35])) for i in range(2)]
    paper = MatrixEntropy().analyze(trace(records, 4))
    assert paper.status is Status.FOUND
    assert paper.summary["collapse_layer"] == 2
    assert "from layer 1 to 2 it falls by 50 %" in paper.verdict
    code = MatrixEntropy(recipe="code").analyze(trace(records, 4))
    assert code.summary["collapse_layer"] == 3
    assert code.rows[0]["entropy"] == 9.0


def test_no_collapse() -> None:
    flat = MatrixEntropy().analyze(trace([record(0, query_entropy=made([1, 1, 1], [0.9, 0.88, 0.87]))], 3))
    assert flat.status is Status.NOT_FOUND
    assert flat.summary["collapse_layer"] is None
    rising = MatrixEntropy().analyze(trace([record(0, query_entropy=made([1, 1], [0.1, 0.2]))], 2))
    assert "never falls" in rising.verdict


def test_two_heads_have_one_direction() -> None:
    few = trace([record(0, query_entropy=made([1, 1], [0.1, 0.0]))], 2)
    few.info = replace(few.info, heads=2)
    assert "one direction" in (MatrixEntropy().analyze(few).reason or "")


def test_reasons() -> None:
    assert MatrixEntropy().analyze(trace([record(0)])).status is Status.NOT_APPLICABLE
    one = np.full((3, 2, VISUAL), np.nan)
    assert MatrixEntropy().analyze(trace([record(0, query_entropy=one)], 3)).status is Status.NOT_APPLICABLE
    with pytest.raises(UsageError, match="recipe"):
        MatrixEntropy(recipe="ours")
