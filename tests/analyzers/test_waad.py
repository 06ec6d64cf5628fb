"""WAAD: golden values, peaks and turns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sinklens.analyzers import Status
from sinklens.analyzers.waad import Waad, peaks
from sinklens.core.errors import UsageError

from .made import causal_uniform, record, trace
from .made_heads import head_record, look_back_groups, softmax_maps

T = 48


def previous_token(length: int) -> np.ndarray:
    return np.eye(length, k=-1) + np.diag([1.0] + [0.0] * (length - 1))


def test_attention_to_the_previous_token_is_one_everywhere() -> None:
    weights = causal_uniform(2, 5, T)
    weights[0, :3] = previous_token(T)  # 3 of 10 heads: exactly the local ones
    finding = Waad().analyze(trace([head_record(weights)]))
    line = finding.figures[0].series[0].y  # type: ignore[union-attr]
    assert line[0] == 0
    np.testing.assert_allclose(line[1:], 1)
    assert finding.status is Status.NOT_FOUND
    assert finding.summary["mean"] == pytest.approx((T - 1) / T)


def test_numbers_equal_the_plainest_code() -> None:
    records, tables = [], []
    for index, length in enumerate((T, 61)):
        weights = softmax_maps(index, 3, 4, length)
        near, _ = look_back_groups(weights)
        mean_map = weights.reshape(-1, length, length)[near].mean(0)
        tables.append([sum(mean_map[t, s] * min(t - s, 10) for s in range(t + 1)) for t in range(length)])
        records.append(head_record(weights, index=index))
    finding = Waad().analyze(trace(records))
    expected = {}
    for index, table in enumerate(tables):
        cut = np.quantile(table, 0.8)
        for t in range(1, len(table) - 1):
            if table[t] > table[t - 1] and table[t] > table[t + 1] and table[t] >= cut:
                expected[index, t] = table[t]
    assert {(row["prompt"], row["position"]) for row in finding.rows} == set(expected)
    for row in finding.rows:
        assert row["waad"] == pytest.approx(expected[row["prompt"], row["position"]])
        table = tables[row["prompt"]]
        changes = sorted((abs(a - b) for a, b in itertools.pairwise(table)), reverse=True)
        assert row["change"] == pytest.approx(abs(table[row["position"]] - table[row["position"] + 1]))
        assert row["turn"] == (row["change"] >= np.quantile(changes, 0.6))
    assert [row["waad"] for row in finding.rows] == sorted((r["waad"] for r in finding.rows), reverse=True)
    assert finding.summary["peaks_per_100_tokens"] == pytest.approx(100 * len(expected) / (T + 61))
    assert "All positions are treated as response." in finding.notes


def test_the_column_of_the_first_token_can_be_left_out() -> None:
    """Half of the attention on the first token, half on the previous one: cut at 10, then renormalised."""
    weights = np.zeros((1, 1, T, T))
    weights[0, 0] = previous_token(T) / 2
    weights[0, 0, :, 0] += 0.5
    value = Waad().analyze(trace([head_record(weights)])).figures[0].series  # type: ignore[union-attr]
    assert value[0].y[30] == pytest.approx(0.5 * 10 + 0.5)
    assert value[1].y[30] == pytest.approx(1)


def test_peaks_that_any_curve_has_are_not_a_finding() -> None:
    weights = np.tril(np.exp(np.random.default_rng(3).normal(size=(2, 5, T, T)) * 0.3))
    weights /= weights.sum(-1, keepdims=True)
    finding = Waad().analyze(trace([head_record(weights)]))
    assert finding.status is Status.NOT_FOUND
    assert finding.summary["n_peaks"] == len(finding.rows) > 0
    assert "no token stands out by 2 tokens above the median of its prompt" in finding.verdict


def test_a_token_at_which_local_heads_look_back_far_is_found() -> None:
    weights = causal_uniform(2, 5, T)
    weights[0, :3] = previous_token(T)
    weights[0, :3, 30] = np.eye(T)[22]
    finding = Waad().analyze(trace([head_record(weights)]))
    assert finding.status is Status.FOUND
    assert [row["position"] for row in finding.rows] == [30]
    assert finding.rows[0]["above_usual"] == pytest.approx(7)
    assert "at 1 token they look at least 2 tokens farther than usual" in finding.verdict
    assert Waad(margin=7.5).analyze(trace([head_record(weights)])).status is Status.NOT_FOUND


def test_peaks() -> None:
    values = np.array([9, 1, 6, 5, 5, np.nan, 8, 3, 4, 3, 1, 7.0])
    assert np.flatnonzero(peaks(values, 0.01)).tolist() == [2, 8]
    assert np.flatnonzero(peaks(values, 0.6)).tolist() == [2]
    assert not peaks(np.full(9, np.nan), 0.5).any()
    assert not peaks(np.array([1.0, 2.0]), 0.5).any()


def test_unknown_values_stay_unknown() -> None:
    made = head_record(softmax_maps(0, 2, 2, T))
    made.arrays["local_distance"][1, 0] = np.nan
    finding = Waad().analyze(trace([made]))
    assert finding.summary["mean_without_first"] is not None


def test_not_applicable_and_settings() -> None:
    assert "at least 32 tokens" in str(Waad().analyze(trace([head_record(causal_uniform(1, 2, 20))])).reason)
    assert "local_distance" in str(Waad().analyze(trace([record(causal_uniform(1, 2, T))])).reason)
    with pytest.raises(UsageError):
        Waad(quantile=1)
    with pytest.raises(UsageError):
        Waad(margin=0)
