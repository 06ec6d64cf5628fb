"""Golden cases of the alignment with the first token."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.analyzers import Status
from sinklens.analyzers.bos_alignment import BosAlignment

from .made import record, trace
from .made_chain import chain_record

DEPTH, LENGTH, WIDTH = 5, 11, 7


def unit_states(*angles: float) -> np.ndarray:
    """States whose angle to the first token's is given for the tokens after it, in every layer."""
    hidden = np.zeros((DEPTH, len(angles) + 1, WIDTH))
    hidden[:, 0, 0] = 3.0
    for position, angle in enumerate(angles, start=1):
        hidden[:, position, 0], hidden[:, position, 2] = np.cos(angle), np.sin(angle)
    return hidden


def test_the_mean_is_of_the_squared_cosine_without_the_first_token() -> None:
    finding = BosAlignment().analyze(trace([chain_record(unit_states(0.0, np.pi, np.pi / 2, np.pi / 3))]))
    assert [row["cos2"] for row in finding.rows] == pytest.approx([(1 + 1 + 0 + 0.25) / 4] * DEPTH)
    assert [row["aligned"] for row in finding.rows] == pytest.approx([0.5] * DEPTH)
    assert finding.status is Status.NOT_FOUND  # aligned, but no larger than the others
    assert "50.0 % of the tokens are aligned" in finding.verdict


def test_a_large_aligned_token_makes_it_found() -> None:
    hidden = unit_states(*[1.5] * 9, 0.1)
    hidden[2:4, 10] *= 7
    finding = BosAlignment().analyze(trace([chain_record(hidden)]))
    assert [(row["layer"], row["sink_like"]) for row in finding.rows if row["sink_like"]] == [
        (2, pytest.approx(0.1)),
        (3, pytest.approx(0.1)),
    ]
    assert finding.status is Status.FOUND
    assert "Up to 10 % of the tokens (layer 2) have a large norm" in finding.verdict
    assert BosAlignment(norm_gate=8.0).analyze(trace([chain_record(hidden)])).status is Status.NOT_FOUND


def test_a_narrow_cone_is_not_found() -> None:
    hidden = np.ones((DEPTH, LENGTH, WIDTH)) + 0.01 * np.random.default_rng(2).normal(
        size=(DEPTH, LENGTH, WIDTH)
    )
    finding = BosAlignment().analyze(trace([chain_record(hidden)]))
    assert finding.summary["aligned_max"] == 1.0
    assert finding.status is Status.NOT_FOUND


def test_exactly_the_threshold_is_not_aligned() -> None:
    hidden = unit_states(0.1, 1.0)
    at = float(np.abs(np.cos(0.1)))
    made = chain_record(hidden)
    made["residual_cosine"][:, 0, 1] = at
    assert BosAlignment(aligned=at).analyze(trace([made])).summary["aligned_max"] == 0


def test_the_last_block_is_left_out_of_the_mean_over_layers() -> None:
    hidden = unit_states(np.pi / 2, np.pi / 2)
    hidden[-1, 1:] = hidden[-1, 0]
    summary = BosAlignment().analyze(trace([chain_record(hidden)])).summary
    assert summary["cos2_mean"] == pytest.approx(0.0)
    assert summary["cos2_max"] == pytest.approx(1.0)
    assert (summary["cos2_max_layer"], summary["aligned_max_layer"]) == (DEPTH - 1, DEPTH - 1)


def test_prompts_weigh_the_same_whatever_their_length() -> None:
    made = trace([chain_record(unit_states(0.0)), chain_record(unit_states(*[np.pi / 2] * 9), index=1)])
    assert BosAlignment().analyze(made).summary["cos2_max"] == pytest.approx(0.5)


def test_random_directions_are_not_aligned() -> None:
    hidden = np.random.default_rng(0).normal(size=(DEPTH, 500, 64))
    finding = BosAlignment().analyze(trace([chain_record(hidden)]))
    assert finding.status is Status.NOT_FOUND
    assert finding.summary["cos2_max"] == pytest.approx(1 / 64, rel=0.2)
    assert "No other token becomes like" in finding.verdict


def test_one_token_or_no_comparison_is_not_applicable() -> None:
    assert BosAlignment().analyze(trace([chain_record(unit_states())])).status is Status.NOT_APPLICABLE
    bare = record(None, np.ones((DEPTH, LENGTH, WIDTH)))
    assert BosAlignment().analyze(trace([bare])).status is Status.NOT_APPLICABLE
    elsewhere = chain_record(unit_states(0.0, 1.0))
    elsewhere["reference_position"][:] = 1
    assert BosAlignment().analyze(trace([elsewhere])).status is Status.NOT_APPLICABLE


def test_different_first_tokens_are_said() -> None:
    records = [chain_record(unit_states(0.0), pieces=[name, "x"], index=i) for i, name in enumerate("ab")]
    finding = BosAlignment().analyze(trace(records))
    assert any("2 different tokens" in note for note in finding.notes)
    assert finding.summary["same_token_share"] == 0.5
