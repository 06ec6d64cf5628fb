"""Paired statistics against definitions, simulations and scipy's own."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from sinklens.evaluation.metrics import Metric
from sinklens.evaluation.statistics import compare_paired, holm, mcnemar, paired_test

RIGHT = Metric("accuracy", "accuracy", "share", "right", role="primary", binary=True)
MEAN = Metric("score", "score", "mean", "x", role="primary")
RATIO = Metric("valid", "accuracy among valid", "share", "right", "valid")
PPL = Metric("perplexity", "perplexity", "", "nats", "tokens", better=-1, exponential=True)


def test_metrics_are_ratios_of_sums() -> None:
    columns = {
        "nats": np.array([2.0, 9.0]),
        "tokens": np.array([1.0, 10.0]),
        "right": np.array([1.0, 0.0]),
        "valid": np.array([1.0, 0.0]),
    }
    assert PPL.value(columns) == pytest.approx(math.exp(1.0))
    assert RATIO.value(columns) == 1.0
    assert RIGHT.value(columns) == 0.5
    assert math.isnan(RATIO.value({"right": np.zeros(2), "valid": np.zeros(2)}))


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 0), (6, 0), (3, 11), (7, 7)])
def test_mcnemar_is_the_binomial_test(gained: int, lost: int) -> None:
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n
    assert mcnemar(gained, lost) == pytest.approx(min(1.0, 2 * tail))


def test_the_permutation_test_is_exact_where_it_can_be() -> None:
    rng = np.random.default_rng(1)
    before, after = rng.normal(size=9), rng.normal(size=9) + 0.7
    found, name = paired_test(MEAN, (before, np.ones(9)), (after, np.ones(9)), seed=0)
    step = after - before
    every = [abs(np.mean(np.array(signs) * step)) for signs in itertools.product((1, -1), repeat=9)]
    assert found == pytest.approx(np.mean(np.array(every) >= abs(step.mean()) - 1e-12))
    assert "exact" in name


def test_the_permutation_test_agrees_with_scipy_where_it_draws() -> None:
    rng = np.random.default_rng(2)
    before, after = rng.normal(size=40), rng.normal(size=40) + 0.3
    found, _ = paired_test(MEAN, (before, np.ones(40)), (after, np.ones(40)), seed=3)
    theirs = stats.permutation_test(
        (after, before),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        rng=np.random.default_rng(4),
    )
    assert found == pytest.approx(theirs.pvalue, abs=0.02)


def test_a_swap_of_a_ratio_swaps_both_of_its_parts() -> None:
    before = {"right": np.array([1.0, 0, 1, 1]), "valid": np.array([1.0, 0, 1, 1])}
    after = {"right": np.array([1.0, 0, 0, 1]), "valid": np.array([1.0, 1, 1, 1])}
    a, b = RATIO.parts(before), RATIO.parts(after)
    found, _ = paired_test(RATIO, a, b, seed=0)
    deltas = []
    for flips in itertools.product((False, True), repeat=4):
        f = np.array(flips)
        first = [np.where(f, y, x).sum() for x, y in zip(a, b, strict=True)]
        second = [np.where(f, x, y).sum() for x, y in zip(a, b, strict=True)]
        deltas.append(second[0] / second[1] - first[0] / first[1])
    observed = b[0].sum() / b[1].sum() - a[0].sum() / a[1].sum()
    assert found == pytest.approx(np.mean(np.abs(deltas) >= abs(observed) - 1e-12))


@pytest.mark.parametrize("metric", [MEAN, RIGHT, PPL])
def test_intervals_cover_the_truth_as_often_as_they_say(metric: Metric) -> None:
    """95 % intervals of 60 experiments: fewer than 49 hits would happen once in 5000 runs."""
    rng = np.random.default_rng(5)
    hits = 0
    for seed in range(60):
        n = 80
        if metric is MEAN:
            base = rng.normal(size=n)
            before, after, truth = {"x": base}, {"x": base + rng.normal(0.2, 0.5, n)}, 0.2
        elif metric is RIGHT:
            base = rng.random(n) < 0.6
            now = np.where(rng.random(n) < 0.25, rng.random(n) < 0.8, base)
            before, after, truth = {"right": base.astype(float)}, {"right": now.astype(float)}, 0.25 * 0.2
        else:
            tokens = rng.integers(5, 50, n).astype(float)
            nats = tokens * rng.normal(1.0, 0.2, n)
            before = {"nats": nats, "tokens": tokens}
            after = {"nats": nats + tokens * rng.normal(0.1, 0.2, n), "tokens": tokens}
            truth = math.exp(1.1) - math.exp(1.0)
        found = compare_paired(metric, before, after, seed=seed)
        assert found.ci_low is not None
        assert found.ci_high is not None
        hits += found.ci_low <= truth <= found.ci_high
    assert hits >= 49


def test_no_difference_is_an_interval_of_width_zero_and_p_of_one() -> None:
    columns = {"right": np.array([1.0, 0, 1, 1, 0])}
    found = compare_paired(RIGHT, columns, columns)
    assert (found.delta, found.ci_low, found.ci_high, found.p_value, found.changed) == (0, 0, 0, 1, 0)
    # Six answers, all gained or all lost, are the least that McNemar's test calls a change.
    assert found.detectable == pytest.approx(6 / 5)


def test_the_detectable_change_is_detected_four_times_in_five() -> None:
    rng = np.random.default_rng(6)
    n, spread = 100, 1.0
    first = compare_paired(MEAN, {"x": np.zeros(n)}, {"x": rng.normal(0, spread, n)})
    assert first.detectable is not None
    shift = 2.8016 * spread / math.sqrt(n)
    assert first.detectable == pytest.approx(shift, rel=0.2)
    seen = [
        compare_paired(MEAN, {"x": np.zeros(n)}, {"x": rng.normal(shift, spread, n)}).p_value < 0.05
        for _ in range(40)
    ]
    assert 0.6 <= np.mean(seen) <= 0.97


def test_one_item_has_no_interval() -> None:
    found = compare_paired(MEAN, {"x": np.array([1.0])}, {"x": np.array([2.0])})
    assert found.ci_low is None
    assert found.p_value == 1.0


def test_nothing_to_divide_by_is_no_number() -> None:
    before = {"right": np.zeros(6), "valid": np.zeros(6)}
    after = {"right": np.ones(6), "valid": np.ones(6)}
    found = compare_paired(RATIO, before, after)
    assert math.isnan(found.baseline)
    assert math.isnan(found.p_value)
    assert found.ci_low is None


def test_holm_multiplies_the_smallest_most_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    found = holm([0.01, math.nan, 0.02])
    assert found[0] == pytest.approx(0.02)
    assert math.isnan(found[1])


def test_items_must_be_pairs() -> None:
    with pytest.raises(ValueError, match="pairs"):
        compare_paired(MEAN, {"x": np.zeros(3)}, {"x": np.zeros(4)})
