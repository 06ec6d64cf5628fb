"""The exit layer from hand-made curves."""

from __future__ import annotations

from typing import Any

from sinklens.analyzers import Status, VisualExitLayer
from sinklens.analyzers.base import Finding

from .made_visual import record, trace


def found(*curves: list[float], agrees: list[list[bool]] | None = None, **settings: Any) -> Finding:
    prompts = [
        {
            "prompt": i,
            "kl": curve,
            "agrees": agrees[i] if agrees else [True] * len(curve),
            "loss_ratio": [1 + value for value in curve],
        }
        for i, curve in enumerate(curves)
    ]
    made = trace([record(0)], experiments={"visual_exit": {"prompts": prompts}})
    return VisualExitLayer(**settings).analyze(made)


def test_the_first_layer_below_epsilon() -> None:
    """Three prompts: exits at 2, at 1 (but not to the end before 3), never."""
    finding = found([3, 1, 0.001, 0.0], [3, 0.005, 0.5, 0.001], [3, 2, 1, 0.5])
    assert finding.status is Status.FOUND
    assert finding.summary["exit_median"] == 2
    assert finding.summary["stable_median"] == 3
    assert finding.summary["never"] == 1
    assert [row["qualifies"] for row in finding.rows] == [0, 1 / 3, 1 / 3, 2 / 3]
    assert finding.rows[0]["kl"] == 3
    assert [row["oracle"] for row in finding.rows] == [0, 1 / 3, 1 / 3, 2 / 3]
    assert "1 of 3 need it in every layer" in finding.verdict


def test_one_early_exit_does_not_speak_for_the_others() -> None:
    finding = found([3, 1, 0.001], [3, 2, 1], [3, 2, 1])
    assert finding.status is Status.NOT_FOUND
    assert finding.verdict.startswith(
        "Most prompts need their picture in every layer; 1 of 3 could do without it"
    )


def test_the_likeliest_tokens_must_stay() -> None:
    finding = found([0.001, 0.001], agrees=[[False, True]])
    assert finding.summary["exit_median"] == 1
    assert found([0.5, 0.5]).status is Status.NOT_FOUND
    assert found([0.5, 0.5], epsilon=1.0).summary["exit_median"] == 0


def test_reasons() -> None:
    assert "add --verify" in (VisualExitLayer().analyze(trace([record(0)])).reason or "")
    assert found().status is Status.NOT_APPLICABLE
