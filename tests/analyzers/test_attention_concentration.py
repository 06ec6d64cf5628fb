"""Attention concentration: weights in [1, 3], equal to the plainest code, and pressed by a sink."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinklens.analyzers import Status
from sinklens.analyzers.attention_concentration import AttentionConcentration
from sinklens.core.errors import UsageError

from .made import causal_uniform, record, trace, with_sink
from .made_heads import softmax_maps, visibility

T = 37


def plain(weights: np.ndarray, divide: str) -> np.ndarray:
    """The definition on one layer's maps `[head, query, key]`."""
    total = weights.sum((0, 1))
    seen = np.array([T - k for k in range(T)])
    total = total / {"none": np.ones(T), "linear": seen, "root": np.sqrt(seen)}[divide]
    return 1 + 2 * (total - total.min()) / (total.max() - total.min())


@pytest.mark.parametrize("divide", ["none", "linear", "root"])
def test_weights_equal_the_plainest_code(divide: str) -> None:
    weights = softmax_maps(7, 3, 5, T)
    found = AttentionConcentration(divide=divide).weights(record(weights))  # type: ignore[arg-type]
    for layer in range(3):
        np.testing.assert_allclose(found[layer], plain(weights[layer], divide))


@given(st.integers(0, 2**31), st.sampled_from(["none", "linear", "root"]))
def test_weights_span_the_whole_scale(seed: int, divide: str) -> None:
    found = AttentionConcentration(divide=divide).weights(record(softmax_maps(seed, 2, 3, T)))  # type: ignore[arg-type]
    assert found.min() == 1
    assert found.max() == pytest.approx(3)
    assert ((found >= 1) & (found <= 3 + 1e-12)).all()


def test_a_sink_presses_all_others() -> None:
    weights = causal_uniform(2, 3, T)
    for head in range(3):
        with_sink(weights, 1, head, 4, 0.99)
    finding = AttentionConcentration(divide="linear").analyze(trace([record(weights)]))
    rows = {row["layer"]: row for row in finding.rows}
    assert rows[1]["position"] == 4
    others = np.delete(plain(weights[1], "linear"), 4)
    assert rows[1]["pressed"] == pytest.approx((others < 1.1).mean())
    assert rows[1]["pressed"] > rows[0]["pressed"]


def test_windows_divide_by_what_sees_the_key() -> None:
    seen = visibility(T, 9)
    weights = (seen / seen.sum(1, keepdims=True))[None, None]
    found = AttentionConcentration(divide="linear").weights(record(weights, seen=seen))
    total = weights[0, 0].sum(0) / seen.sum(0)
    np.testing.assert_allclose(found[0], 1 + 2 * (total - total.min()) / (total.max() - total.min()))


def test_equal_tokens_get_the_low_weight_and_missing_layers_no_row() -> None:
    made = record(
        np.broadcast_to(np.full((T, T), 1 / T), (2, 3, T, T)).copy(), seen=np.ones((T, T), dtype=bool)
    )
    np.testing.assert_allclose(AttentionConcentration().weights(made), 1)
    made.arrays["attention_received_mean"][0] = np.nan
    finding = AttentionConcentration().analyze(trace([made]))
    assert [row["layer"] for row in finding.rows] == [1]


def test_not_applicable_and_settings() -> None:
    bare = AttentionConcentration().analyze(trace([record(causal_uniform(1, 2, T))], attention=False))
    assert bare.status is Status.NOT_APPLICABLE
    with pytest.raises(UsageError):
        AttentionConcentration(low=3, high=3)
    with pytest.raises(UsageError):
        AttentionConcentration(divide="square")  # type: ignore[arg-type]
