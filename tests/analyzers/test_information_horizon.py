"""The information horizon from hand-made windows."""

from __future__ import annotations

import pytest

from sinklens.analyzers import InformationHorizon, Status
from sinklens.analyzers.base import Finding
from sinklens.core.errors import UsageError

from .made_visual import record, trace


def found(*prompts: list[list[float]], layers: tuple[int, ...] = (0, 2, 4)) -> Finding:
    each = [
        {"prompt": i, "full": 0.9, "without": [0.1] * len(layers), "information": information}
        for i, information in enumerate(prompts)
    ]
    made = trace([record(0)], experiments={"visual_horizon": {"layers": list(layers), "prompts": each}})
    return InformationHorizon().analyze(made)


def test_mean_and_spread_must_stay_small_to_the_end() -> None:
    """The second prompt is quiet at layer 0 by its mean only, and again loud at 4: no horizon."""
    finding = found([[0.5, 0.1], [0.001, -0.002], [0.0, 0.003]], [[0.2, -0.2], [0.0, 0.0], [0.3, 0.0]])
    assert finding.status is Status.FOUND
    assert finding.summary["horizon_median"] == 2
    assert finding.summary["never"] == 1
    assert [row["behind"] for row in finding.rows] == [0, 0.5, 0.5]
    assert finding.rows[0]["information"] == pytest.approx((0.3 + 0.0) / 2)
    assert finding.rows[0]["spread"] == pytest.approx((0.2 + 0.2) / 2)
    assert finding.rows[2]["largest"] == 0.3


def test_no_horizon() -> None:
    finding = found([[0.5, 0.1], [0.4, 0.2], [0.3, 0.3]])
    assert finding.status is Status.NOT_FOUND
    assert finding.verdict.startswith("No horizon")


def test_reasons() -> None:
    assert "add --verify" in (InformationHorizon().analyze(trace([record(0)])).reason or "")
    assert found().status is Status.NOT_APPLICABLE
    with pytest.raises(UsageError, match="at least 1"):
        InformationHorizon(window=0)
