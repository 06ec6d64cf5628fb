"""Window shares against the plainest code on full maps."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.analyzers import Status
from sinklens.analyzers.window_shares import WindowShares, uniform_share

from .made import causal_uniform, record, trace, with_sink
from .made_heads import head_record, softmax_maps

T = 97


def test_window_shares_equal_the_published_definitions() -> None:
    weights = [softmax_maps(seed, 2, 3, length) for seed, length in ((1, 64), (2, 89))]
    finding = WindowShares().analyze(trace([head_record(w, index=i) for i, w in enumerate(weights)]))
    for row in finding.rows:
        for k in (1, 4, 8):
            shares, boosts = [], []
            for w in weights:
                length = w.shape[-1]
                tail = w[row["layer"], row["head"], length - 64 :]
                shares.append(tail.mean(0)[:k].sum())
                boosts.append(
                    shares[-1] / np.mean([min(k, q + 1) / (q + 1) for q in range(length - 64, length)])
                )
            assert row[f"share_{k}"] == pytest.approx(np.mean(shares))
            assert row[f"boost_{k}"] == pytest.approx(np.mean(boosts))
    assert finding.summary["boost_4"] == pytest.approx(np.mean([row["boost_4"] for row in finding.rows]))
    assert "differ in length" in finding.notes[0]
    assert set(finding.rows[0]) - {"layer", "head"} == set(finding.units)


def test_uniform_attention_has_a_boost_of_one() -> None:
    finding = WindowShares().analyze(trace([head_record(causal_uniform(2, 3, T))]))
    assert all(row["boost_4"] == pytest.approx(1) for row in finding.rows)
    assert uniform_share(1000, 4) == pytest.approx(np.mean([4 / (q + 1) for q in range(936, 1000)]))
    assert uniform_share(5, 8) == 1


def test_a_boost_a_little_above_one_is_not_a_finding() -> None:
    weights = causal_uniform(2, 3, T)
    weights[..., 0] *= 1.2
    weights /= weights.sum(-1, keepdims=True)
    finding = WindowShares().analyze(trace([head_record(weights)]))
    assert 1 < finding.summary["boost_4"] < 1.1
    assert finding.status is Status.NOT_FOUND
    assert "less than the 1.5 times that count as a preference" in finding.verdict
    assert WindowShares(least_boost=1.01).analyze(trace([head_record(weights)])).status is Status.FOUND


def test_a_sink_raises_the_boost_of_its_head_alone() -> None:
    weights = causal_uniform(2, 3, T)
    with_sink(weights, 1, 2, 0, 0.8)
    finding = WindowShares().analyze(trace([head_record(weights)]))
    assert finding.status is Status.FOUND
    top = finding.rows[0]
    assert (top["layer"], top["head"]) == (1, 2)
    assert top["share_1"] == pytest.approx(0.8)
    assert top["peak_share"] == pytest.approx(0.8)
    assert finding.summary["boost_4_by_layer"][0] == pytest.approx(1)


def test_layers_without_attention_have_no_row() -> None:
    made = head_record(causal_uniform(3, 2, T))
    for name in ("attention_tail", "tail_peak"):
        made.arrays[name][1] = np.nan
    finding = WindowShares().analyze(trace([made]))
    assert {row["layer"] for row in finding.rows} == {0, 2}
    assert finding.summary["boost_4_by_layer"][1] is None


def test_not_applicable() -> None:
    short = WindowShares().analyze(trace([record(causal_uniform(2, 3, 40))]))
    assert short.status is Status.NOT_APPLICABLE
    assert "at least 64 tokens; the longest has 40" in str(short.reason)
    old = WindowShares().analyze(trace([record(causal_uniform(2, 3, 80))]))
    assert "does not hold attention_tail" in str(old.reason)
    none = WindowShares().analyze(trace([head_record(causal_uniform(2, 3, 80))], attention=False))
    assert "no softmax attention" in str(none.reason)
