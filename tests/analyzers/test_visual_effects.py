"""Words for what taking visual tokens out does: needed, free, better without, open."""

from __future__ import annotations

from typing import Any

from sinklens.analyzers import Status, VisualEffects
from sinklens.analyzers.base import Finding

from .made_effects import effects, measured
from .made_visual import record, trace

SOME = [0.01, 0.02, 0.03, 0.02, 0.01, 0.03]


def found(*sets: dict[str, Any], **rest: Any) -> Finding:
    return VisualEffects().analyze(trace([record(0)], experiments={"visual_effects": effects(*sets, **rest)}))


def test_tokens_that_hurt_beyond_the_controls_are_needed() -> None:
    finding = found(measured("objects", [2.0, 2.1, 1.9, 2.2, 2.0, 1.8], SOME, source="masks"))
    assert finding.status is Status.FOUND
    row = finding.rows[0]
    assert row["verdict"] == "needed"
    assert round(row["loss_mean"], 9) == 1.98
    assert row["loss_low"] < 1.98 < row["loss_high"]
    assert round(row["right_mean"], 9) == -1.98
    assert "The answers need the objects (2.0 per prompt): the loss rises by 2.000" in finding.verdict
    assert any("check of the experiment" in note for note in finding.notes)
    drawn = finding.figures[0]
    assert (drawn.rows[0].value, drawn.rows[0].note) == (2.0, "needed")  # type: ignore[union-attr]


def test_free_better_and_open() -> None:
    """Little change; more loss than none but less than the controls; a gain; an interval on both sides."""
    sets = [
        measured("small", [0.001, -0.002, 0.0, 0.001, 0.002, -0.001], SOME),
        measured("less", [0.1, 0.12, 0.09, 0.1, 0.11, 0.1], [0.9, 1.0, 1.1, 1.0, 0.9, 1.1]),
        measured("gain", [-0.3, -0.31, -0.29, -0.3, -0.28, -0.32], SOME),
        measured("wide", [1.0, -1.0, 2.0, -2.0, 0.5, -0.5], SOME),
    ]
    finding = found(*sets)
    assert {row["name"]: row["verdict"] for row in finding.rows} == {
        "small": "free", "less": "needed less than others", "gain": "better without", "wide": "not told apart",
    }  # fmt: skip
    assert finding.rows[-1]["verdict"] == "free"
    assert "can be taken out" in finding.verdict
    assert "is open" in finding.verdict
    assert "need the less (2.0 per prompt) less than random tokens" in finding.verdict


def test_one_prompt_decides_nothing() -> None:
    finding = found(measured("objects", [2.0], [0.0]), n=1)
    assert finding.status is Status.NOT_FOUND
    assert finding.rows[0]["verdict"] == "not told apart"
    assert any("Only 1 prompt" in note for note in finding.notes)


def test_prompts_without_an_answer_are_said_to_be() -> None:
    given = effects(measured("objects", [2.0, 2.1], [0.0, 0.1]))
    finding = VisualEffects().analyze(
        trace([record(0)], experiments={"visual_effects": {**given, "answered": 0}})
    )
    assert any("No prompt has an answer" in note for note in finding.notes)
    assert "texts after the pictures" in finding.verdict
    assert "answers" not in finding.verdict


def test_reasons() -> None:
    assert "add --verify" in (VisualEffects().analyze(trace([record(0)])).reason or "")
    skipped = trace([record(0)], experiments_skipped={"visual_effects": "No prompt has pictures."})
    assert VisualEffects().analyze(skipped).reason == "No prompt has pictures."
    none = found(measured("sinks", [], [], too_few=3))
    assert none.status is Status.NOT_APPLICABLE
    assert "as many other" in (none.reason or "")
