"""Golden cases of sensitivity: the rule table, paired intervals, and what is said of variants that were not run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sinklens.analyzers import Sensitivity, Status
from sinklens.analyzers.sensitivity import (
    ABSENT,
    BY_LENGTH,
    DEPENDS,
    NUMERIC,
    STRUCTURAL,
    difference,
    interval,
)

from . import made

N = 7
SOURCES = [f"made:{i}" for i in range(N)]


def measured(rate: float, position: int = 0, *, found: bool = True, **other: Any) -> dict[str, Any]:
    """A measurement whose rates are spread evenly around a mean."""
    spread = np.linspace(-1.5, 1.5, N)
    return {
        "found": found,
        "position": position,
        "token": "a",
        "seq_len": 61,
        "sources": SOURCES,
        "rate": list(rate + spread),
        "share": [0.4] * N,
        "position_rate": list(rate + spread),
        "norm": [1.0, 9.0],
        "alike": [0.1] * N,
        **other,
    }


def variant(
    group: str, label: str, *args: Any, votes: bool = True, note: str = "", **other: Any
) -> dict[str, Any]:
    return {"group": group, "label": label, "votes": votes, "note": note, **measured(*args, **other)}


def skipped(group: str, label: str, why: str) -> dict[str, Any]:
    return {"group": group, "label": label, "votes": True, "note": "", "skipped": why}


def finding(base: dict[str, Any], *variants: dict[str, Any]) -> Any:
    trace = made.trace([made.record(made.causal_uniform(2, 3, 37))])
    result = {"analyzer": {"epsilon": 0.3}, "dtype": "float32", "base": base, "variants": list(variants)}
    trace.manifest["experiments"] = {"sensitivity": result}
    return Sensitivity().analyze(trace)


@pytest.mark.parametrize(
    ("base", "variants", "kind", "status"),
    [
        (measured(60), [variant("BOS", "without BOS", 58)], STRUCTURAL, Status.NOT_FOUND),
        (measured(60), [variant("BOS", "without BOS", 2, found=False)], DEPENDS, Status.FOUND),
        (measured(60), [variant("BOS", "without BOS", 58, 3)], DEPENDS, Status.FOUND),
        (measured(60), [variant("dtype", "in float16", 1, found=False)], NUMERIC, Status.FOUND),
        (measured(60), [variant("length", "at 256 tokens", 1, found=False)], BY_LENGTH, Status.FOUND),
        (
            measured(60),
            [
                variant("length", "at 256 tokens", 1, found=False),
                variant("BOS", "without BOS", 2, found=False),
            ],
            DEPENDS,
            Status.FOUND,
        ),
        (
            measured(1, found=False),
            [variant("text", "with random tokens", 1, found=False)],
            ABSENT,
            Status.NOT_FOUND,
        ),
        (measured(1, found=False), [variant("BOS", "with BOS", 50)], DEPENDS, Status.FOUND),
        # One repeated token makes all positions equal: it has no vote.
        (
            measured(60),
            [variant("text", "with one token repeated", 0, found=False, votes=False)],
            STRUCTURAL,
            Status.NOT_FOUND,
        ),
        # A dtype that also loses it does not make a loss of the input a matter of precision.
        (
            measured(60),
            [
                variant("dtype", "in float16", 1, found=False),
                variant("length", "at 128 tokens", 1, found=False),
            ],
            DEPENDS,
            Status.FOUND,
        ),
    ],
)
def test_the_rule(base: dict[str, Any], variants: list[dict[str, Any]], kind: str, status: Status) -> None:
    found = finding(base, *variants)
    assert found.summary["kind"] == kind
    assert found.status is status
    assert found.tiles[0].value == kind


def test_the_sentence_names_what_loses_the_sink() -> None:
    found = finding(
        measured(60),
        variant("BOS", "without BOS", 2, found=False),
        variant("text", "with random tokens", 59),
        variant("length", "at 128 tokens", 55, 4),
    )
    assert found.summary["depends_on"] == ["without BOS", "at 128 tokens"]
    assert "without BOS it is gone (rate 60.0 % to 2.0 %)" in found.verdict
    assert "at 128 tokens it moves from position 0 to 4" in found.verdict
    assert "random" not in found.verdict


def test_strength_counts_only_beyond_noise_and_size() -> None:
    large, small = variant("BOS", "without BOS", 45), variant("text", "with random tokens", 55)
    of_length = variant("length", "at 128 tokens", 20)
    found = finding(measured(60), large, small, of_length)
    assert found.summary["kind"] == STRUCTURAL
    assert found.summary["strength_depends_on"] == ["without BOS"]
    assert "Its strength changes: without BOS." in found.verdict
    assert Sensitivity(min_change=4).analyze(_again(found, large, small)).summary["strength_depends_on"] == [
        "without BOS",
        "with random tokens",
    ]


def _again(_: Any, *variants: dict[str, Any]) -> Any:
    trace = made.trace([made.record(made.causal_uniform(2, 3, 37))])
    result = {
        "analyzer": {"epsilon": 0.3},
        "dtype": "float32",
        "base": measured(60),
        "variants": list(variants),
    }
    trace.manifest["experiments"] = {"sensitivity": result}
    return trace


def test_nothing_is_skipped_silently() -> None:
    found = finding(measured(60), skipped("chat template", "with chat template", "There is none."))
    assert found.rows[0]["skipped"] == "There is none."
    assert found.rows[0]["rate"] is None
    assert found.notes == ["Not run, with chat template: There is none."]
    assert (found.summary["variants"], found.summary["variants_run"]) == (1, 0)
    strip = found.figures[0]
    assert [row.note for row in strip.rows] == ["on position 0", "not run"]
    assert np.isnan(strip.rows[1].value)


def test_a_difference_is_paired_where_the_prompts_are_the_same() -> None:
    base = measured(60)
    entry = variant("text", "with random tokens", 52)
    entry["sources"] = [f"made from {source}" for source in SOURCES][::-1]
    entry["rate"] = [rate - 8 for rate in base["rate"]][::-1]
    delta, low, high, paired = difference(entry, base)
    assert paired
    # Every prompt loses exactly eight points: paired, there is no spread at all.
    assert (delta, low, high) == pytest.approx((-8, -8, -8))
    entry["sources"] = [f"other:{i}" for i in range(N)]
    delta, low, high, paired = difference(entry, base)
    assert not paired
    assert delta == pytest.approx(-8)
    assert low is not None
    assert high is not None
    assert low < -8 < high


def test_one_prompt_has_no_interval() -> None:
    assert interval(np.array([3.0])) == (None, None)
    one = {**measured(60), "sources": ["a"], "rate": [60.0], "share": [0.4], "position_rate": [60.0]}
    found = finding(
        one, {**one, "group": "BOS", "label": "without BOS", "votes": True, "note": "", "alike": [0.1]}
    )
    assert found.rows[0]["delta"] == 0
    assert found.rows[0]["delta_low"] is None
    assert found.summary["strength_depends_on"] == []


@pytest.mark.parametrize("why", [None, "It was switched off."])
def test_not_run_is_not_applicable(why: str | None) -> None:
    trace = made.trace([made.record(made.causal_uniform(2, 3, 37))])
    if why:
        trace.manifest["experiments_skipped"] = {"sensitivity": why}
    found = Sensitivity().analyze(trace)
    assert found.status is Status.NOT_APPLICABLE
    assert found.reason == (why or "It was not run; add --sensitivity.")
    assert not found.tiles


def test_lengths_that_lose_the_sink_are_told_in_one_clause() -> None:
    """Shares fall with length by definition, so the sentence says what the rule finds and not what is there."""
    lengths = [variant("length", f"at {n} tokens", 1, found=False, lift=6.4) for n in (256, 512)]
    alone = finding(measured(60), *lengths)
    assert alone.verdict == (
        "The sink depends on the length of the prompts: at 256 tokens and at 512 tokens the same rule finds no sink."
    )
    assert alone.notes[0].startswith(
        "At 256 tokens position 0 receives 6.4 times the share of uniform attention"
    )
    assert len(alone.notes) == 2
    both = finding(measured(60), variant("BOS", "without BOS", 2, found=False), *lengths).verdict
    assert both.endswith(
        "without BOS it is gone (rate 60.0 % to 2.0 %); at 256 tokens and at 512 tokens the same rule finds no sink "
        "either."
    )
    one = finding(measured(60), lengths[0]).verdict
    assert one.endswith("at 256 tokens the same rule finds no sink (rate 60.0 % to 1.0 %).")


def test_a_length_without_a_vote_changes_no_word_and_says_why() -> None:
    why = "The run's own prompts hold more than one BOS; other lengths have no vote."
    lengths = [variant("length", f"at {n} tokens", 1, found=False, votes=False, note=why) for n in (256, 512)]
    found = finding(measured(60), *lengths)
    assert found.summary["kind"] == STRUCTURAL
    assert found.notes == [why]


@pytest.mark.parametrize(
    ("found", "whose"), [(True, "the sink's"), (False, "that of the run's strongest position")]
)
def test_a_model_without_a_sink_is_not_said_to_have_one(found: bool, whose: str) -> None:
    repeated = variant("text", "with one token repeated", 0, found=False, votes=False)
    notes = finding(measured(60, found=found), repeated).notes
    assert len(notes) == 1
    assert f"half as long as {whose};" in notes[0]
    assert ("sink" in notes[0]) is found
