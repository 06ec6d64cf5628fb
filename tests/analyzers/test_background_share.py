"""BackgroundShare on pictures whose masks are known."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.analyzers import BackgroundShare, Status
from sinklens.core.errors import UsageError
from sinklens.core.figures import Intervals
from sinklens.tracers.trace import PromptRecord

from .made_pictures import LENGTH, made, phi_record

OBJECTS = (2, 3, 6, 7)
"""Positions of visual tokens (1 to 8) that show an object, wholly; position 5 does to four tenths."""


def masked(index: int, sinks: dict[tuple[int, int], float]) -> PromptRecord:
    item = phi_record(index, sinks)
    part = np.full(LENGTH, np.nan, dtype=np.float32)
    part[1:9] = 0.0
    part[list(OBJECTS)], part[5] = 1.0, 0.4
    item.arrays["object_share"] = part
    return item


def test_sinks_on_the_background_stand_beside_the_base_rate() -> None:
    records = [masked(i, {(2, 1): 30.0, (3, 1): 30.0, (3, 4): 30.0, (4, 0): 60.0}) for i in range(12)]
    finding = BackgroundShare().analyze(made(records))
    assert finding.status is Status.FOUND
    summary = finding.summary
    assert (summary["sinks"], summary["tokens"]) == (24, 96), "each token counts once, and text sinks do not"
    assert (summary["background"], summary["base_rate"], summary["enrichment"]) == (1.0, 0.5, 2.0)
    assert (summary["ci_low"], summary["ci_high"]) == (0.5, 0.5), "all pictures are alike"
    assert [(row["layer"], row["sinks"]) for row in finding.rows] == [(2, 12), (3, 24)]
    assert "100.0 % of the 24 visual sinks and 50.0 % of all visual tokens" in finding.verdict
    (figure,) = finding.figures
    assert isinstance(figure, Intervals)
    assert [row.label for row in figure.rows] == ["any layer", "layer 2", "layer 3"]


def test_how_much_of_a_cell_makes_it_an_object() -> None:
    trace = made([masked(i, {(3, 5): 30.0}) for i in range(12)])
    assert BackgroundShare().analyze(trace).summary["background"] == 1.0
    some = BackgroundShare(covered=0.3).analyze(trace)
    assert (some.summary["background"], some.summary["base_rate"]) == (0.0, 3 / 8)
    assert some.status is Status.NOT_FOUND
    with pytest.raises(UsageError, match="covered"):
        BackgroundShare(covered=0.0)


def test_sinks_anywhere_are_not_found() -> None:
    places = np.tile(np.arange(1, 9), 5)
    finding = BackgroundShare().analyze(made([masked(i, {(2, int(p)): 30.0}) for i, p in enumerate(places)]))
    assert finding.status is Status.NOT_FOUND
    summary = finding.summary
    assert summary["ci_low"] < 0 < summary["ci_high"]
    assert summary["difference"] == 0.0


def test_the_interval_draws_pictures_and_not_sinks() -> None:
    """Two kinds of pictures, with many sinks each: the interval is as wide as that of the pictures."""
    on = {(2, position): 30.0 for position in (1, 4, 5, 8)}
    off = {(2, position): 30.0 for position in OBJECTS}
    finding = BackgroundShare().analyze(made([masked(i, on if i % 2 else off) for i in range(12)]))
    half = (finding.summary["ci_high"] - finding.summary["ci_low"]) / 2
    assert half == pytest.approx(1.96 * 0.5 / 12**0.5, abs=0.05)


def test_it_says_why_it_does_not_apply() -> None:
    bare = BackgroundShare().analyze(made([phi_record(0, {(2, 1): 30.0})]))
    assert bare.status is Status.NOT_APPLICABLE
    assert "no picture came with a mask" in (bare.reason or "")
    none = BackgroundShare().analyze(made([masked(0, {(2, 0): 30.0})]))
    assert "no visual token that a mask covers is a sink" in (none.reason or "")
    mixed = BackgroundShare().analyze(made([masked(0, {(2, 1): 30.0}), phi_record(1, {(2, 1): 30.0})]))
    assert mixed.notes == [
        "1 prompt without a mask was left out.",
        "1 prompt with masks: too few for an interval.",
    ]
