"""Metrics as ratios of sums over items, so that every one can be resampled, paired and tested in the same way.

An accuracy is right answers over items, an accuracy among valid answers right over valid ones, F1 twice the true
positives over themselves plus both kinds of error, a perplexity the exponential of nats over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

ITEMS = "items"
"""The denominator of a mean over items: 1 for each."""

Columns = Mapping[str, Float[np.ndarray, " item"]]
Role = Literal["primary", "guard", "other"]


@dataclass(frozen=True)
class Metric:
    """One number about a task.

    Attributes:
        top, bottom: Columns whose sums are divided.
        better: 1 if more is better, -1 if less is, 0 if neither is.
        role: The verdict rests on the `primary` metric; it must not be bought with a loss in a `guard`.
        exponential: Whether the number is the exponential of the ratio.
        binary: Whether `top` is 0 or 1 per item and the ratio a mean over items, so that McNemar's test applies.
    """

    name: str
    title: str
    unit: str
    top: str
    bottom: str = ITEMS
    better: Literal[1, 0, -1] = 1
    role: Role = "other"
    exponential: bool = False
    binary: bool = False

    def parts(self, columns: Columns) -> tuple[Float[np.ndarray, " item"], Float[np.ndarray, " item"]]:
        """Numerators and denominators per item."""
        top = np.asarray(columns[self.top], dtype=np.float64)
        bottom = np.ones_like(top) if self.bottom == ITEMS else np.asarray(columns[self.bottom], np.float64)
        return top, bottom

    def value(self, columns: Columns) -> float:
        """The metric over all items; NaN if there is nothing to divide by (no valid answer, no mention)."""
        top, bottom = self.parts(columns)
        return float(self.of_sums(top.sum(), bottom.sum()))

    def of_sums(self, top: np.ndarray | float, bottom: np.ndarray | float) -> np.ndarray:
        """The metric from sums, elementwise."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratio = np.where(np.asarray(bottom) > 0, np.asarray(top) / np.asarray(bottom), np.nan)
            return np.exp(ratio) if self.exponential else ratio
