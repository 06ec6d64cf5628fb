"""The recency fit: the worked example, noise, sinks left out, and margins of the grid."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.analyzers import PositionBias, Status
from sinklens.analyzers.position_bias import no_outliers, recency_fit
from sinklens.core.errors import UsageError

from .made_visual import COLS, LENGTH, ROWS, VISUAL, received, record, trace


def test_the_worked_example() -> None:
    """T = 8, y = .01 e^(1.5 i / 8)."""
    mu, sigma, explained = recency_fit(0.01 * np.exp(1.5 * np.arange(8) / 8))
    assert (mu, sigma, explained) == pytest.approx((0.01, 1.5, 1.0))


def test_the_fit_is_in_linear_space() -> None:
    """A tiny value pulls the logarithms and hardly the fit: the best of a fine grid is not beaten."""
    rng = np.random.default_rng(0)
    x = np.arange(40) / 40
    y = 0.02 * np.exp(1.1 * x) * rng.uniform(0.8, 1.2, 40)
    y[3] = 1e-7
    mu, sigma, _ = recency_fit(y)
    loss = ((mu * np.exp(sigma * x) - y) ** 2).sum()
    grid = np.array(
        [
            [((m * np.exp(s * x) - y) ** 2).sum() for s in np.linspace(0.2, 2.0, 91)]
            for m in np.linspace(0.005, 0.05, 91)
        ]
    )
    assert loss <= grid.min() * (1 + 1e-6)
    slope, _ = np.polyfit(x, np.log(y), 1)
    assert abs(slope - sigma) > 0.05
    assert recency_fit(np.zeros(5)) == (0.0, 0.0, 0.0)
    assert recency_fit(np.full(5, 0.3))[2] == 0.0


def picture(sigma: float, sink: bool = False) -> np.ndarray:
    share = np.full((4, LENGTH), 0.001)
    share[:, 1 : 1 + VISUAL] = 0.01 * np.exp(sigma * np.arange(VISUAL) / VISUAL)
    if sink:
        share[:, 3] = 0.5
    return share


def test_a_sink_is_left_out_before_the_fit() -> None:
    records = [record(i, **received(picture(1.2, sink=True))) for i in range(3)]
    finding = PositionBias().analyze(trace(records, 4))
    assert finding.status is Status.FOUND
    assert [row["sigma"] for row in finding.rows] == pytest.approx([1.2] * 4, rel=1e-4)
    assert all(row["left_out"] == 1 for row in finding.rows)
    assert abs(recency_fit(picture(1.2, sink=True)[0, 1 : 1 + VISUAL].astype(float))[1] - 1.2) > 1
    assert "prefer late visual tokens" in finding.verdict
    order, margins = finding.figures
    assert len(order.series) == 2  # type: ignore[union-attr]
    assert [len(series.x) for series in margins.series] == [ROWS, COLS]  # type: ignore[union-attr]
    assert no_outliers(np.array([1.0, 1.0, 1.0, 9.0])).all()


def test_no_bias() -> None:
    finding = PositionBias().analyze(trace([record(0, **received(picture(0.1)))], 4))
    assert finding.status is Status.NOT_FOUND
    assert finding.notes
    early = PositionBias().analyze(trace([record(0, **received(picture(-0.9)))], 4))
    assert "prefer early" in early.verdict
    both = picture(1.2)
    both[0] = picture(-0.9)[0]
    mixed = PositionBias().analyze(trace([record(0, **received(both))], 4))
    assert "3 of 4 layers prefer late visual tokens and 1 early ones" in mixed.verdict


def test_reasons() -> None:
    assert PositionBias().analyze(trace([record(0)])).status is Status.NOT_APPLICABLE
    unseen = received(picture(1.0))
    unseen["queries_visible"] = np.zeros_like(unseen["queries_visible"])
    assert "sees it" in (PositionBias().analyze(trace([record(0, **unseen)], 4)).reason or "")
    with pytest.raises(UsageError, match="queries"):
        PositionBias(queries="generated")
