"""Means over prompts with their intervals. Prompts are paired: differences are taken within a prompt, then averaged."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over prompts and its 95 % Student-t interval; None where fewer than two prompts have a value.

    Attributes:
        n: Prompts that have a value.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def mean_interval(values: Float[np.ndarray, " prompt"]) -> Interval:
    """Mean of the values that are known (NaN is not), with its interval.

    The t interval is used rather than a bootstrap because a run looks at about 8 prompts: percentiles of resampled
    means of so few are known to be too narrow. Equal values give an interval of width 0.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    n = len(known)
    if n == 0:
        return Interval(None, None, None, 0)
    mean = float(known.mean())
    if n == 1:
        return Interval(mean, None, None, 1)
    from scipy.stats import t

    half = float(t.ppf(0.5 + LEVEL / 2, n - 1) * known.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def paired_difference(after: Float[np.ndarray, " prompt"], before: Float[np.ndarray, " prompt"]) -> Interval:
    """`after - before` within each prompt, then the mean."""
    if len(after) != len(before):
        raise ValueError(f"{len(after)} values after and {len(before)} before are not pairs")
    return mean_interval(np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64))
