"""Paired statistics of a metric with and without a change: interval, test, correction, and what could have been seen.

Items are the unit: both models answered the same ones, so items are resampled and swapped as pairs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from .metrics import Columns, Metric

LEVEL, POWER = 0.95, 0.8
RESAMPLES = 4999
EXACT_ITEMS = 13
"""Up to this many items that differ, all 2^n ways of swapping them are tried; beyond, a sample of them."""


@dataclass(frozen=True)
class Comparison:
    """One metric without and with the change.

    Attributes:
        delta: `mitigated - baseline`.
        ci_low, ci_high: Interval of `delta`; None where items are too few or too alike for one.
        interval: How it was made.
        p_value: Two-sided, of no change.
        test: Which one.
        n: Items.
        changed: Items on which the two differ.
        detectable: The smallest true change that this number of items would have shown with 80 % power (at the level
            corrected for the number of verdicts); None where nothing varied.
    """

    metric: str
    baseline: float
    mitigated: float
    delta: float
    ci_low: float | None
    ci_high: float | None
    interval: str
    p_value: float
    test: str
    n: int
    changed: int
    detectable: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_paired(
    metric: Metric, before: Columns, after: Columns, *, seed: int = 0, verdicts: int = 1
) -> Comparison:
    """Compare a metric over the same items.

    Args:
        before, after: Columns per item, in the same order.
        verdicts: How many verdicts the run gives; the detectable change is stated at the level divided by it.

    Raises:
        ValueError: Not the same number of items.
    """
    a, b = metric.parts(before), metric.parts(after)
    if len(a[0]) != len(b[0]):
        raise ValueError(f"{len(b[0])} items after and {len(a[0])} before are not pairs")
    n = len(a[0])
    baseline, mitigated = metric.value(before), metric.value(after)
    delta = mitigated - baseline
    differs = (a[0] != b[0]) | (a[1] != b[1])
    drawn, low, high, kind = interval(metric, a, b, seed=seed)
    p_value, test = paired_test(metric, a, b, seed=seed)
    alpha = (1 - LEVEL) / max(1, verdicts)
    return Comparison(
        metric.name,
        baseline,
        mitigated,
        delta,
        low,
        high,
        kind,
        p_value,
        test,
        n,
        int(differs.sum()),
        _detectable(metric, drawn, n, alpha),
    )


Parts = tuple[Float[np.ndarray, " item"], Float[np.ndarray, " item"]]


def interval(
    metric: Metric, before: Parts, after: Parts, *, seed: int
) -> tuple[Float[np.ndarray, " draw"], float | None, float | None, str]:
    """The resampled deltas and their 95 % interval: BCa, or percentile where BCa is not defined."""
    n = len(before[0])
    if n < 2:
        return np.empty(0), None, None, "none: one item has no spread"
    if not np.any((before[0] != after[0]) | (before[1] != after[1])):
        return np.zeros(1), 0.0, 0.0, "all items are the same"
    from scipy.stats import bootstrap

    def delta(index: np.ndarray, axis: int = -1) -> np.ndarray:
        index = index.astype(np.int64)
        sums = [part[index].sum(axis) for part in (*before, *after)]
        return metric.of_sums(sums[2], sums[3]) - metric.of_sums(sums[0], sums[1])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # degenerate cases warn; they are recognised below by their NaN
        found = bootstrap(
            (np.arange(n, dtype=np.float64),),
            delta,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=max(1, 4_000_000 // n),
            confidence_level=LEVEL,
            method="BCa",
            rng=np.random.default_rng(seed),
        )
    drawn = np.asarray(found.bootstrap_distribution)
    drawn = drawn[np.isfinite(drawn)]
    low, high = float(found.confidence_interval.low), float(found.confidence_interval.high)
    if math.isfinite(low) and math.isfinite(high):
        return drawn, low, high, f"BCa bootstrap over items, {RESAMPLES} resamples"
    if len(drawn) < RESAMPLES / 2:
        return drawn, None, None, "none: most resamples have nothing to divide by"
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return drawn, float(low), float(high), f"percentile bootstrap over items, {len(drawn)} resamples"


def paired_test(metric: Metric, before: Parts, after: Parts, *, seed: int) -> tuple[float, str]:
    """p of no change: McNemar's exact test for answers that are right or wrong, else swapping items' two results."""
    if metric.binary:
        gained, lost = int((after[0] > before[0]).sum()), int((after[0] < before[0]).sum())
        return mcnemar(gained, lost), f"McNemar exact ({gained} gained, {lost} lost)"
    return swapped(metric, before, after, seed=seed)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p that as many items were gained as lost."""
    from scipy.stats import binomtest

    return 1.0 if gained + lost == 0 else float(binomtest(gained, gained + lost, 0.5).pvalue)


def swapped(metric: Metric, before: Parts, after: Parts, *, seed: int) -> tuple[float, str]:
    """A permutation test: if nothing changed, an item's two results may be swapped.

    All ways of swapping the items that differ where these are at most 13; else 4999 of them, the observed one counted
    among them so that p is never 0.
    """
    step = [now - then for then, now in zip(before, after, strict=True)]
    moved = np.flatnonzero((step[0] != 0) | (step[1] != 0))
    if not len(moved):
        return 1.0, "permutation of pairs: no item differs"
    exact = len(moved) <= EXACT_ITEMS
    observed = _swapped_delta(metric, before, step, moved, np.zeros((1, len(moved))))[0]
    if not math.isfinite(observed):
        return math.nan, "none: nothing to divide by"
    rng = np.random.default_rng(seed)
    total, reached = 0, 0
    for flips in _flips(len(moved), exact, rng):
        deltas = _swapped_delta(metric, before, step, moved, flips)
        known = deltas[np.isfinite(deltas)]
        total += len(known)
        reached += int((np.abs(known) >= abs(observed) * (1 - 1e-9) - 1e-15).sum())
    if exact:
        return reached / total, f"exact permutation of pairs ({total})"
    return (reached + 1) / (total + 1), f"permutation of pairs ({RESAMPLES} drawn)"


def _flips(count: int, exact: bool, rng: np.random.Generator) -> Any:
    if exact:
        yield ((np.arange(2**count)[:, None] >> np.arange(count)) & 1).astype(np.float64)
        return
    rows = max(1, 4_000_000 // count)
    for start in range(0, RESAMPLES, rows):
        yield rng.integers(0, 2, (min(rows, RESAMPLES - start), count)).astype(np.float64)


def _swapped_delta(
    metric: Metric, before: Parts, step: Sequence[np.ndarray], moved: np.ndarray, flips: np.ndarray
) -> np.ndarray:
    """Delta with some items swapped. A swap adds an item's step to the one side and takes it from the other."""
    first = [then.sum() + flips @ s[moved] for then, s in zip(before, step, strict=True)]
    second = [then.sum() + s.sum() - flips @ s[moved] for then, s in zip(before, step, strict=True)]
    return metric.of_sums(second[0], second[1]) - metric.of_sums(first[0], first[1])


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: p values that stay valid when the smallest of several is picked. NaN stays NaN."""
    known = [i for i, p in enumerate(p_values) if not math.isnan(p)]
    corrected = [math.nan] * len(p_values)
    worst = 0.0
    for rank, i in enumerate(sorted(known, key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, (len(known) - rank) * p_values[i]))
        corrected[i] = worst
    return corrected


def _detectable(metric: Metric, drawn: np.ndarray, n: int, alpha: float) -> float | None:
    """Normal approximation with the bootstrap's standard error; for right-or-wrong answers at least as much as
    McNemar's test needs when all changes go one way."""
    from scipy.stats import norm

    floor = 0.0
    if metric.binary:
        floor = math.ceil(1 - math.log2(alpha)) / n  # 2 * 0.5^k <= alpha
    spread = float(drawn.std(ddof=1)) if len(drawn) > 1 else 0.0
    found = max(floor, float(norm.ppf(1 - alpha / 2) + norm.ppf(POWER)) * spread)
    return found if found > 0 else None
