"""Row and column entropies and the rule, against the plainest code on full maps."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.analyzers import Status
from sinklens.analyzers.attention_entropy import AttentionEntropy
from sinklens.core.errors import UsageError

from .made import causal_uniform, record, trace, with_sink
from .made_heads import head_record, softmax_maps

T = 64


def plain(weights: np.ndarray) -> tuple[float, float, float, int]:
    """Mean row entropy, mean row ratio, largest column ratio with its key, of one map `[query, key]`."""
    length = len(weights)

    def entropy(p: np.ndarray) -> float:
        return -sum(float(x) * np.log(x) for x in p if x > 0)

    rows = [entropy(row) for row in weights]
    ratios = [h / np.log(q + 1) if q else 0.0 for q, h in enumerate(rows)]
    columns = []
    for k in range(length - 16 + 1):
        column = weights[:, k]
        columns.append(entropy(column / column.sum()) / np.log(length - k) if column.sum() else 0.0)
    return float(np.mean(rows)), float(np.mean(ratios)), max(columns), int(np.argmax(columns))


def test_numbers_and_rule_equal_the_plainest_code() -> None:
    weights = softmax_maps(5, 2, 5, T)
    with_sink(weights, 0, 3, 0, 0.9)
    with_sink(weights, 1, 1, 6, 0.85)
    with_sink(weights, 1, 4, 0, 0.3)
    finding = AttentionEntropy().analyze(trace([head_record(weights)]))
    expected = {}
    for layer in range(2):
        for head in range(5):
            raw, ratio, column, at = plain(weights[layer, head])
            if ratio < 0.5 and column > 0.9:
                expected[layer, head] = (raw, ratio, column, at)
    assert set(expected) >= {(0, 3), (1, 1)}
    assert (1, 4) not in expected
    assert {(row["layer"], row["head"]) for row in finding.rows} == set(expected)
    for row in finding.rows:
        raw, ratio, column, at = expected[row["layer"], row["head"]]
        assert row["row_entropy"] == pytest.approx(raw)
        assert row["row_ratio"] == pytest.approx(ratio)
        assert row["column_ratio"] == pytest.approx(column)
        assert row["position"] == at
        assert row["share"] == pytest.approx(weights[row["layer"], row["head"], :, at].sum() / (T - at))
    assert set(finding.rows[0]) - {"layer", "head"} == set(finding.units)


def test_uniform_and_diagonal_attention_have_no_sink_head() -> None:
    weights = causal_uniform(1, 2, T)
    weights[0, 1] = np.eye(T)
    finding = AttentionEntropy().analyze(trace([head_record(weights)]))
    assert finding.status is Status.NOT_FOUND
    heat = finding.figures[0].values[0]  # type: ignore[union-attr]
    assert heat[0] == pytest.approx((T - 1) / T)  # every row but the first is uniform
    assert heat[1] == 0


def test_an_even_but_empty_column_needs_a_share() -> None:
    """A head that looks at itself and gives key 3 one part in a thousand meets the rule of the code."""
    weights = np.eye(T)[None, None] * 0.999
    weights[0, 0, :3] = np.eye(T)[:3]
    weights[0, 0, 3, 2:4] = 0.999, 0
    weights[0, 0, 3:, 3] += 0.001
    made = head_record(weights)
    assert AttentionEntropy().analyze(trace([made])).status is Status.FOUND
    assert AttentionEntropy(min_share=0.1).analyze(trace([made])).status is Status.NOT_FOUND


def test_half_of_the_prompts_must_agree() -> None:
    sink, plain_map = causal_uniform(1, 2, T), causal_uniform(1, 2, T)
    with_sink(sink, 0, 1, 0, 0.95)
    both = AttentionEntropy().analyze(trace([head_record(sink), head_record(plain_map, index=1)]))
    assert both.rows[0]["prompts"] == 0.5
    third = [head_record(sink), head_record(plain_map, index=1), head_record(plain_map, index=2)]
    assert AttentionEntropy().analyze(trace(third)).rows == []


def test_not_applicable_and_settings() -> None:
    short = AttentionEntropy().analyze(trace([head_record(causal_uniform(1, 2, 20))]))
    assert short.status is Status.NOT_APPLICABLE
    old = AttentionEntropy().analyze(trace([record(causal_uniform(1, 2, T))]))
    assert "does not hold attention_entropy" in str(old.reason)
    with pytest.raises(UsageError):
        AttentionEntropy(row=0)
