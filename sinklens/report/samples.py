"""A thresholded rate that a reader can question: the map of the rate, and the rate against the threshold.

Both are drawn for the finding's own threshold. What the page's slider needs is embedded as counts per
threshold: how many prompts exceed it in each layer and head. That is exact and its size does not grow with
the prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from sinklens.core.adjustable import epsilons, with_own
from sinklens.core.figures import Heatmap, Lines, Samples, Series

from . import heatmap, lines
from .heatmap import Drawing
from .numbers import brief, percent


@dataclass(frozen=True)
class Counts:
    """How often each threshold is exceeded.

    Attributes:
        thresholds: Ascending; contains the finding's own.
        above: `[threshold, layer, head]` prompts with a value above the threshold.
        valid: `[layer, head]` prompts with a value at all.
    """

    thresholds: Float[np.ndarray, " threshold"]
    above: Int[np.ndarray, "threshold layer head"]
    valid: Int[np.ndarray, "layer head"]

    def rate(self, index: int) -> float:
        """The overall rate at one threshold in percent, NaN without values."""
        total = int(self.valid.sum())
        return 100 * float(self.above[index].sum()) / total if total else float("nan")

    def rate_map(self, index: int) -> Float[np.ndarray, "layer head"]:
        """The rate of each layer and head in percent, NaN where there is no value."""
        return 100 * np.where(self.valid > 0, self.above[index] / np.maximum(self.valid, 1), np.nan)


def thresholds(values: Float[np.ndarray, "prompt layer head"], own: float) -> Float[np.ndarray, " threshold"]:
    """A grid for the slider: fine near zero for shares, even steps otherwise, always with `own`."""
    known = values[np.isfinite(values)]
    if known.size and known.min() >= 0 and known.max() <= 1:
        return epsilons(own)
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    return with_own(np.linspace(low, high, 101), own)


def count(figure: Samples) -> Counts:
    """Counts at every threshold of the grid. The comparison is strict, as in the rate's definition."""
    values = np.asarray(figure.values)
    grid = thresholds(values, figure.threshold) if figure.grid is None else np.asarray(figure.grid)
    known: Bool[np.ndarray, "prompt layer head"] = np.isfinite(values)
    above = np.stack([((values > threshold) & known).sum(axis=0) for threshold in grid])
    return Counts(grid, above, known.sum(axis=0))


def sentence(figure: Samples, counts: Counts) -> str:
    """What the rate is at the finding's threshold; the slider rewrites it."""
    own = int(np.argmin(np.abs(counts.thresholds - figure.threshold)))
    return f"At threshold {brief(float(figure.threshold))} the rate is {percent(counts.rate(own))} %."


def rate_map(figure: Samples, counts: Counts | None = None) -> Heatmap:
    """The rate by layer and head at the finding's threshold, always on the scale 0 to 100 %."""
    found = counts or count(figure)
    own = int(np.argmin(np.abs(found.thresholds - figure.threshold)))
    return Heatmap(
        figure.key, figure.title, figure.caption, found.rate_map(own), "% of prompts", limits=(0.0, 100.0)
    )


def draw(
    figure: Samples, counts: Counts, *, figure_id: str, width: int = 578, height: int = 380
) -> tuple[Drawing, Drawing]:
    """The map and the curve."""
    curve = Lines(
        figure.key + "-curve",
        "Rate against threshold",
        "",
        (Series("", counts.thresholds, np.array([counts.rate(i) for i in range(len(counts.thresholds))])),),
        f"threshold ({figure.unit})",
        "rate (%)",
        marks=((figure.threshold, f"this run: {brief(float(figure.threshold))}"),),
    )
    return (
        heatmap.draw(rate_map(figure, counts), figure_id=figure_id, width=width, height=height),
        lines.draw(curve, figure_id=figure_id + "-curve", width=width, height=220),
    )
