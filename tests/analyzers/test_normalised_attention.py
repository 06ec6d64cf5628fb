"""Normalised attention score: the probe divisor, and what the wrong one does."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.analyzers import Status
from sinklens.analyzers.normalised_attention import NormalisedAttention, score
from sinklens.core.errors import UsageError

from .made import causal_uniform, record, trace
from .made_heads import head_record, softmax_maps

T = 80
PROBES = np.array([9, 33, 50, 61, 76, 77, 78, 79])


def test_both_divisors_equal_the_plainest_code() -> None:
    weights = softmax_maps(2, 3, 4, T)
    made = head_record(weights, probes=PROBES)
    for recipe in ("paper", "code"):
        table = score(made, recipe=recipe)
        for layer in range(3):
            for k in range(T):
                rows = [q for q in PROBES if q >= k]
                total = weights[layer, :, rows, k].sum() / 4
                assert table[layer, k] == pytest.approx(total / (len(rows) if recipe == "paper" else T - k))


def test_uniform_probes_score_by_the_right_divisor_only() -> None:
    """Every probe gives each key the same: the right score is flat, the other rises towards the end."""
    weights = np.tril(np.full((T, T), 0.01))[None, None]
    made = head_record(weights, probes=PROBES)
    np.testing.assert_allclose(score(made)[0], 0.01)
    coded = score(made, recipe="code")[0]
    np.testing.assert_allclose(coded[-4:], 0.01)
    assert coded[0] == pytest.approx(0.01 * len(PROBES) / T)
    finding = NormalisedAttention().analyze(trace([made]))
    assert finding.rows[0]["lift"] == pytest.approx(1)
    assert finding.status is Status.NOT_FOUND
    assert NormalisedAttention(recipe="code").analyze(trace([made])).rows[0]["position"] >= T - 4


def test_rows_name_the_most_salient_token_and_the_overlap() -> None:
    weights = softmax_maps(3, 2, 3, T)
    weights[1, :, :, 7] += 2
    made = head_record(weights, probes=PROBES)
    finding = NormalisedAttention().analyze(trace([made]))
    assert finding.rows[0]["layer"] == 1
    assert finding.rows[0]["position"] == 7
    expected = score(made)[1]
    assert finding.rows[0]["score"] == pytest.approx(expected.max())
    assert finding.rows[0]["lift"] == pytest.approx(expected.max() / np.median(expected))
    n = round(0.6 * T)
    both = [set(np.argsort(-score(made, recipe=r)[1], kind="stable")[:n]) for r in ("paper", "code")]
    assert finding.rows[0]["salient_in_both"] == pytest.approx(len(both[0] & both[1]) / n)
    assert finding.status is Status.FOUND


def test_tokens_no_probe_sees_and_layers_without_attention_are_left_out() -> None:
    weights = softmax_maps(3, 2, 3, T)
    made = head_record(weights, probes=np.array([20, 40]))
    assert np.isnan(score(made)[:, 41:]).all()
    made.arrays["probe_received"][0] = np.nan
    finding = NormalisedAttention().analyze(trace([made]))
    assert [row["layer"] for row in finding.rows] == [1]
    assert finding.rows[0]["position"] <= 40


def test_not_applicable_and_settings() -> None:
    short = NormalisedAttention().analyze(
        trace([head_record(causal_uniform(1, 2, 20), probes=np.array([9]))])
    )
    assert short.status is Status.NOT_APPLICABLE
    assert "probe_received" in str(
        NormalisedAttention().analyze(trace([record(causal_uniform(1, 2, T))])).reason
    )
    with pytest.raises(UsageError):
        NormalisedAttention(recipe="other")  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        NormalisedAttention(unimportant=1)
