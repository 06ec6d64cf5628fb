"""Golden cases of Sink^epsilon: constructed attention with known answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinklens.analyzers import PrimarySinks, Status
from sinklens.analyzers.evidence import uniform_received
from sinklens.core.errors import UsageError

from .made import causal_uniform, record, states, trace, with_sink

T = 64


def test_uniform_attention_has_no_sink_and_a_lift_of_one() -> None:
    finding = PrimarySinks().analyze(trace([record(causal_uniform(3, 5, T))]))
    assert finding.status is Status.NOT_FOUND
    assert finding.rows == []
    assert finding.summary["sink_rate"] == 0


@pytest.mark.parametrize(("length", "expected"), [(64, 0.0741), (128, 0.0424), (256, 0.0239), (512, 0.0133)])
def test_uniform_baseline_is_the_harmonic_number(length: int, expected: float) -> None:
    share = uniform_received(np.arange(length, 0, -1)[None].astype(float))
    assert share[0] == pytest.approx(expected, abs=5e-5)
    harmonic = np.cumsum(1 / np.arange(1, length + 1))
    k = np.arange(1, length)
    np.testing.assert_allclose(share[1:], (harmonic[-1] - harmonic[k - 1]) / (length - k))


@pytest.mark.parametrize("window", [5, 17])
def test_uniform_baseline_under_a_window_and_bidirectional(window: int) -> None:
    seen = np.tril(np.ones((41, 41))) - np.tril(np.ones((41, 41)), -window)
    weights = seen / seen.sum(1, keepdims=True)
    np.testing.assert_allclose(uniform_received(seen.sum(0)[None]), weights.sum(0) / seen.sum(0))
    np.testing.assert_allclose(uniform_received(np.full((2, 41), 41.0)), 1 / 41)


def test_a_constructed_sink_head() -> None:
    weights = with_sink(causal_uniform(1, 1, T), 0, 0, 0, 0.9)
    finding = PrimarySinks().analyze(trace([record(weights)]))
    assert finding.summary["sink_rate"] == 100
    row = finding.rows[0]
    assert row["position"] == 0
    assert row["share"] == pytest.approx((1 + 0.9 * (T - 1)) / T)
    assert row["lift"] == pytest.approx(row["share"] / 0.0741, rel=1e-3)


def test_threshold_comes_before_the_average() -> None:
    # Half of the heads are sinks: the rate is exactly 50; averaging the shares first would give 0 or 100.
    weights = causal_uniform(2, 4, T)
    for layer, head in [(0, 0), (0, 3), (1, 1), (1, 2)]:
        with_sink(weights, layer, head, 0, 0.95)
    finding = PrimarySinks().analyze(trace([record(weights)]))
    assert finding.summary["sink_rate"] == 50
    assert [tuple(h[:2]) for h in finding.summary["heads"]] == [(0, 0), (0, 3), (1, 1), (1, 2)]


@pytest.mark.parametrize("position", [0, 1, 7, 30])
def test_the_position_is_found_and_not_assumed(position: int) -> None:
    weights = causal_uniform(3, 4, T)
    for head in range(4):
        with_sink(weights, 1, head, position, 0.8)
    finding = PrimarySinks().analyze(trace([record(weights)]))
    assert [row["position"] for row in finding.rows] == [position]
    assert finding.rows[0]["token"] == f"t{position}"
    assert finding.rows[0]["first_layer"] == finding.rows[0]["last_layer"] == 1


@pytest.mark.parametrize("seed", range(6))
def test_positions_that_cannot_be_sinks_may_be_left_out(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    records = []
    for index in range(3):
        weights = causal_uniform(2, 3, T)
        for _ in range(seed):
            layer, head, position = (int(rng.integers(n)) for n in (2, 3, T - 8))
            with_sink(weights, layer, head, position, rng.uniform(0.1, 0.9))
        records.append(record(weights, index=index))
    found = PrimarySinks().analyze(trace(records))
    monkeypatch.setattr(PrimarySinks, "_reached", lambda self, evidence: set(range(T)))
    every = PrimarySinks().analyze(trace(records))
    assert found.rows == every.rows
    assert found.summary == every.summary


def test_a_late_column_with_few_queries_is_no_sink() -> None:
    weights = np.broadcast_to(np.eye(T), (2, 3, T, T)).copy()  # pure self-attention: the last key receives 1
    finding = PrimarySinks(epsilon=0.01).analyze(trace([record(weights)]))
    assert all(row["position"] <= T - 16 for row in finding.rows)
    without = PrimarySinks(epsilon=0.01, exclude_diagonal=True).analyze(trace([record(weights)]))
    assert without.rows == []


def test_the_code_recipe_divides_by_the_length_under_a_window() -> None:
    window = 8
    seen = np.tril(np.ones((T, T), dtype=bool)) & ~np.tril(np.ones((T, T), dtype=bool), -window)
    weights = np.broadcast_to(seen / seen.sum(1, keepdims=True), (1, 2, T, T)).copy()
    weights[:, :, :window] = 0
    weights[:, :, :window, 0] = 1  # all rows that see position 0 attend to it
    made = trace([record(weights, seen=seen)])
    paper, code = PrimarySinks(), PrimarySinks(recipe="code")
    assert paper.analyze(made).summary["share"] == pytest.approx(1.0)
    assert code.analyze(made).summary["share"] == pytest.approx(window / T)


def test_heads_that_are_dormant_on_some_queries_are_visible() -> None:
    weights = causal_uniform(1, 2, T)
    weights[0, 1, 1 : T // 2] = 0
    weights[0, 1, 1 : T // 2, 0] = 1  # dormant on the first half of the queries only
    finding = PrimarySinks(epsilon=0.6).analyze(trace([record(weights)]))
    assert finding.summary["heads"] == []
    assert [tuple(head[:2]) for head in finding.summary["dormant_heads"]] == [(0, 1)]


def test_norm_sinks_are_reported_beside_attention_sinks() -> None:
    hidden = states(4, T, 11)
    hidden[1:3, 5] *= 100
    weights = with_sink(causal_uniform(4, 1, T), 2, 0, 0, 0.9)
    summary = PrimarySinks().analyze(trace([record(weights, hidden)])).summary
    assert summary["norm_only"] == [5]
    assert summary["attention_only"] == [0]
    assert summary["agree"] == []


def test_short_prompts_are_not_applicable_with_the_reason() -> None:
    finding = PrimarySinks().analyze(trace([record(causal_uniform(2, 2, 9))]))
    assert finding.status is Status.NOT_APPLICABLE
    assert "at least 32 tokens; the longest has 9" in str(finding.reason)


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(UsageError, match="epsilon"):
        PrimarySinks(epsilon=1.5)
    with pytest.raises(UsageError, match="recipe"):
        PrimarySinks(recipe="paperr")  # type: ignore[arg-type]


@given(st.permutations(range(5)), st.integers(0, 2**16))
def test_permuting_heads_changes_nothing_but_their_names(order: list[int], seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=(2, 5, 37, 37)) * 2
    logits[:, :3, :, 0] += 4
    weights = np.where(np.tril(np.ones((37, 37))) > 0, np.exp(logits), 0)
    weights /= weights.sum(-1, keepdims=True)
    plain = PrimarySinks().analyze(trace([record(weights)]))
    mixed = PrimarySinks().analyze(trace([record(weights[:, order])]))
    assert mixed.summary["sink_rate"] == plain.summary["sink_rate"]
    assert [row["position"] for row in mixed.rows] == [row["position"] for row in plain.rows]
    back = sorted([layer, order[head]] for layer, head, _ in mixed.summary["heads"])
    assert back == sorted(head[:2] for head in plain.summary["heads"])


@given(st.integers(0, 2**16))
def test_a_uniform_head_never_raises_the_rate(seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=(1, 3, 41, 41))
    logits[:, :2, :, 0] += 3
    weights = np.where(np.tril(np.ones((41, 41))) > 0, np.exp(logits), 0)
    weights /= weights.sum(-1, keepdims=True)
    more = np.concatenate([weights, causal_uniform(1, 1, 41)], 1)
    rate = PrimarySinks().analyze(trace([record(weights)])).summary["sink_rate"]
    position = PrimarySinks().analyze(trace([record(weights)])).summary["strongest_position"]
    wider = PrimarySinks().analyze(trace([record(more)])).summary
    if wider["strongest_position"] == position:
        assert wider["sink_rate"] <= rate
