"""How attention to visual tokens rises with their place: an exponential, and what is left out of its fit."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

MADS = 3.0


def no_outliers(values: Float[np.ndarray, " token"]) -> Bool[np.ndarray, " token"]:
    """Tokens within three median absolute deviations of the median; all of them where most are equal."""
    distance = np.abs(values - np.median(values))
    deviation = np.median(distance)
    return distance <= MADS * deviation if deviation > 0 else np.ones(len(values), dtype=bool)


def recency_fit(
    values: Float[np.ndarray, " token"], kept: Bool[np.ndarray, " token"] | None = None
) -> tuple[float, float, float]:
    """mu, sigma and R^2 of mu exp(sigma i / T), by least squares in linear space from a start in logarithms.

    R^2 is 0 where nothing varies. Fitting the logarithms alone would give tiny values too much weight.
    """
    from scipy.optimize import least_squares

    kept = np.ones(len(values), dtype=bool) if kept is None else kept
    x, y = (np.arange(len(values)) / len(values))[kept], values[kept]
    scale = float(y.mean())
    if scale <= 0:
        return 0.0, 0.0, 0.0
    y = y / scale
    positive = y > 0
    slope, start = np.polyfit(x[positive], np.log(y[positive]), 1) if positive.sum() > 1 else (0.0, 0.0)
    fit = least_squares(
        lambda p: p[0] * np.exp(np.clip(p[1] * x, -50, 50)) - y,
        (np.exp(start), slope),
        xtol=1e-14,
        ftol=1e-14,
        gtol=1e-14,
    )
    total = float(((y - y.mean()) ** 2).sum())
    explained = 1 - float((fit.fun**2).sum()) / total if total > 1e-20 else 0.0
    return float(fit.x[0] * scale), float(fit.x[1]), explained


def recency_weights(sigma: float, count: int) -> Float[np.ndarray, " token"]:
    """What scores are multiplied by to take the rise away: 1 / f up to mu, so the first token keeps its score."""
    return np.exp(-sigma * np.arange(count) / count)
