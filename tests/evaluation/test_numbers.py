"""Intervals, divergences, D_sink and what remains, against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sinklens.evaluation import predictions
from sinklens.evaluation.effects import decay, remains
from sinklens.evaluation.paired import mean_interval, paired_difference
from sinklens.evaluation.predictions import divergence, next_token_loss

VALUES = st.lists(st.floats(-50, 50), min_size=2, max_size=12)


@given(VALUES)
def test_the_interval_is_the_t_interval_of_the_mean(values: list[float]) -> None:
    found = mean_interval(np.array(values))
    assert found.n == len(values)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert found.low is not None
    assert found.high is not None
    error = stats.sem(values)
    if error < 1e-9:
        assert found.high - found.low == pytest.approx(0.0, abs=1e-6)
    else:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=error)
        assert (found.low, found.high) == (pytest.approx(low, rel=1e-6), pytest.approx(high, rel=1e-6))


def test_unknown_values_have_no_say() -> None:
    assert mean_interval(np.array([1.0, math.nan, 3.0])).mean == 2.0
    assert mean_interval(np.array([1.0, math.nan, 3.0])).n == 2
    one = mean_interval(np.array([math.nan, 4.0]))
    assert (one.mean, one.low, one.high, one.n) == (4.0, None, None, 1)
    assert mean_interval(np.array([math.nan])).to_json() == {"mean": None, "low": None, "high": None, "n": 0}


def test_differences_are_taken_within_prompts() -> None:
    before, after = np.array([1.0, 10.0, 100.0]), np.array([2.0, 11.0, 101.0])
    found = paired_difference(after, before)
    assert (found.mean, found.low, found.high) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="not pairs"):
        paired_difference(after, before[:2])


def test_divergence_and_loss_by_their_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "ROWS", 5)  # the chunks must not show
    generator = torch.Generator().manual_seed(0)
    base, edited = (torch.randn(13, 31, generator=generator) * 3 for _ in range(2))
    ids = torch.randint(31, (13,), generator=generator)
    p, q = base.double().log_softmax(-1), edited.double().log_softmax(-1)
    assert divergence(base, edited) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert divergence(base, base) == 0.0
    assert divergence(base, edited) != pytest.approx(divergence(edited, base), rel=1e-3)
    assert next_token_loss(base, ids) == pytest.approx(
        float(torch.nn.functional.cross_entropy(base[:-1].double(), ids[1:])), rel=1e-5
    )
    assert math.isnan(next_token_loss(base[:1], ids[:1]))


def test_forbidden_tokens_do_not_spoil_the_divergence() -> None:
    base = torch.tensor([[0.0, 1.0, -math.inf]])
    assert math.isfinite(divergence(base, torch.tensor([[1.0, 0.0, -math.inf]])))


def test_decay_is_the_mean_of_ratios_and_faint_heads_are_left_out() -> None:
    before = np.array([[0.8, 0.2, 0.005], [0.004, 0.001, 0.002], [np.nan] * 3])
    after = np.array([[0.4, 0.2, 0.5], [0.0, 0.0, 0.0], [np.nan] * 3])
    found = decay(before, after)
    assert found.by_layer[0] == pytest.approx(1 - (0.5 + 1.0) / 2)
    assert found.of_means[0] == pytest.approx(1 - 1.1 / 1.005)
    assert np.isnan(found.by_layer[1])
    assert found.of_means[1] == 1.0
    assert np.isnan(found.by_layer[2])
    assert np.isnan(found.of_means[2])
    assert found.faint == 1 + 3


def states(values: list[float]) -> torch.Tensor:
    """A token after each block: these values in dim 3, 1 or -1 in the other dims."""
    made = torch.tensor([[1.0, -1.0, 1.0, 0.0, -1.0]]).repeat(len(values), 1)
    made[:, 3] = torch.tensor(values)
    return made


def test_what_remains_is_looked_for_behind_the_change() -> None:
    base, edited = states([0.0, 100.0, 200.0, 50.0]), states([0.0, 0.0, 120.0, 10.0])
    found = remains(base, edited, [3], layer=1)
    assert (found["before"], found["after"]) == (200.0, 120.0)
    assert found["ratio"] == pytest.approx(0.6)
    assert found["ratio_here"] == 0.0
    assert found["cosine"] == pytest.approx(1.0, abs=1e-3)
    last = remains(base, edited, [3], layer=3)
    assert last["ratio"] == pytest.approx(10 / 50)


def test_the_opposite_of_an_entry_is_not_the_entry() -> None:
    base = states([0.0, -500.0, -400.0, -500.0])
    assert remains(base, states([0.0, 0.0, 200.0, 500.0]), [3], layer=1)["ratio"] == pytest.approx(-0.4)
    assert remains(base, states([0.0, 0.0, 200.0, 0.0]), [3], layer=1)["ratio"] == 0.0
    assert remains(base, states([0.0, 0.0, -100.0, 500.0]), [3], layer=1)["ratio"] == pytest.approx(0.2)


def test_blocks_that_do_not_have_the_entry_do_not_count() -> None:
    """An eraser in block 3 that no longer meets the entry leaves its opposite: that is not the entry coming back."""
    base, erased_anyway = states([0.0, 500.0, 500.0, 1e-4, 0.0]), states([0.0, 0.0, 0.0, -6.8e8, -500.0])
    assert remains(base, erased_anyway, [3], layer=1)["ratio"] == 0.0
    assert remains(base, base, [3], layer=1)["ratio"] == pytest.approx(1.0)
    # A norm behind block 1 makes everything smaller, the entry too: it is still there, and it stays.
    scale = torch.tensor([1.0, 1.0, 0.03, 0.03])[:, None]
    normed = states([0.0, 500.0, 500.0, 500.0]) * scale
    cleared = states([0.0, 20.0, 500.0, 500.0]) * scale
    assert remains(normed, cleared, [3], layer=1)["ratio"] == pytest.approx(1.0)
    # Entries that stand out nowhere are in the blocks in which they are large for what they are.
    assert remains(states([0.1, 2.0, 1.5, 0.1]), states([0.1, 0.0, 0.3, 9.0]), [3], layer=1)[
        "ratio"
    ] == pytest.approx(0.2)
    # Behind block 2 none has it: the block itself is looked at.
    assert remains(base, states([0.0, 500.0, 50.0, -450.0, 9.0]), [3], layer=2)["ratio"] == pytest.approx(0.1)
    # The eraser is taken away: there was nothing that could remain.
    pruned = remains(base, states([0.0, 500.0, 500.0, 500.0, 500.0]), [3], layer=3)
    assert math.isnan(pruned["ratio"])
    assert math.isnan(pruned["ratio_here"])
    assert math.isnan(remains(base, base, [], layer=1)["ratio"])
