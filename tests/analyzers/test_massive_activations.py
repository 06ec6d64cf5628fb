"""Golden cases of massive activations."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.analyzers import MassiveActivations, Status
from sinklens.tracers.trace import PromptRecord

from .made import largest, record, trace


def flat(
    median: float, *entries: tuple[int, int, int, float], layers: int = 4, length: int = 7, width: int = 13
) -> PromptRecord:
    """States whose median magnitude is exactly `median`, with entries (layer, pos, dim, value)."""
    hidden = np.full((layers, length, width), median)
    for layer, pos, dim, value in entries:
        hidden[layer, pos, dim] = value
    return record(None, hidden)


@pytest.mark.parametrize(
    ("value", "median", "massive"),
    [(150, 0.1, True), (150, 0.2, False), (90, 0.01, False), (-150, 0.1, True), (101, 0.101, True)],
)
def test_both_conditions_must_hold(value: float, median: float, massive: bool) -> None:
    finding = MassiveActivations().analyze(trace([flat(median, (1, 0, 3, value))]))
    assert (finding.status is Status.FOUND) == massive


def test_exactly_a_thousand_times_divides_paper_and_code() -> None:
    made = trace([flat(0.125, (1, 0, 3, 125.0))])
    assert MassiveActivations().analyze(made).status is Status.FOUND
    assert MassiveActivations(recipe="code").analyze(made).status is Status.NOT_FOUND


def test_rows_name_layer_position_dim_sign_and_writer() -> None:
    made = trace([flat(0.1, (1, 0, 3, -500.0), (2, 0, 3, -510.0), (2, 4, 9, 130.0))])
    finding = MassiveActivations().analyze(made)
    places = [(r["layer"], r["position"], r["dim"], r["value"], r["written_at"]) for r in finding.rows]
    assert places == [(2, 0, 3, -510.0, 1), (1, 0, 3, -500.0, 1), (2, 4, 9, 130.0, 2)]
    assert finding.rows[0]["ratio_to_median"] == pytest.approx(5100)
    assert finding.summary["dims"] == [3, 9]
    assert (finding.summary["first_layer"], finding.summary["last_layer"]) == (1, 2)


def test_the_down_projection_that_wrote_the_entry_is_named() -> None:
    made = flat(0.1, (1, 0, 3, 500.0), (2, 0, 3, 500.0))
    wrote = np.zeros((4, 7, 13))
    wrote[1, 0, 3] = 498.0
    made.arrays |= largest("down_proj_top", wrote, 5)
    assert MassiveActivations().analyze(trace([made])).rows[0]["down_proj_output"] == 498.0


def test_the_median_is_of_the_whole_layer_not_of_the_token() -> None:
    # The spiking token is large in all dims: against its own median nothing would stand out.
    hidden = np.full((2, 9, 13), 0.1)
    hidden[1, 0] = 90.0
    hidden[1, 0, 5] = 200.0
    finding = MassiveActivations().analyze(trace([record(None, hidden, ranks=20)]))
    assert [(row["position"], row["dim"]) for row in finding.rows] == [(0, 5)]


def test_entries_of_a_few_prompts_only_are_left_out() -> None:
    records = [flat(0.1) for _ in range(30)]
    records[4] = flat(0.1, (1, 2, 3, 300.0))
    for index, item in enumerate(records):
        item.index = index
    assert MassiveActivations().analyze(trace(records)).status is Status.NOT_FOUND
    assert MassiveActivations(min_prompts=0.0).analyze(trace(records)).rows[0]["n_prompts"] == 1


def test_a_model_without_any_says_how_near_it_came() -> None:
    finding = MassiveActivations().analyze(trace([flat(0.1, (2, 0, 3, 7.6))]))
    assert finding.summary["max_ratio"] == pytest.approx(76)
    assert "76 times" in finding.verdict
    assert "dim 3" in finding.verdict


def test_not_applicable_without_prompts() -> None:
    made = trace([flat(0.1, (1, 0, 3, 150.0))])
    made.records.clear()
    finding = MassiveActivations().analyze(made)
    assert finding.status is Status.NOT_APPLICABLE
    assert finding.reason == "there are no prompts."
