"""What a reader may change in a report without the model: thresholds of a rule, with the data the rule reads.

The page repeats the rule (static/thresholds.js); tests hold its sentences equal to those of the analyzer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Threshold:
    """A number that can be changed.

    Attributes:
        name: The analyzer's parameter.
        least, most: What the data in the page can answer.
    """

    name: str
    label: str
    value: float
    least: float
    most: float | None = None
    step: float | None = None


@dataclass(frozen=True, eq=False)
class Adjustable:
    """A rule with its thresholds and everything it reads.

    Attributes:
        rule: Which rule; the page has a function of this name.
        arrays: Numbers, float32 or float64 where they are compared, else whole ones.
        facts: Plain values, ready-made parts of sentences among them.
        words: Tokens as a sentence quotes them; `arrays["word"]` holds places in this list.
        headline: Whether a positive verdict belongs into the run's main sentence.
        note: What the page cannot answer, in a sentence; empty if nothing.
    """

    rule: str
    thresholds: tuple[Threshold, ...]
    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    headline: bool = False
    note: str = ""


def quoted(words: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Each different word once, quoted as in sentences, and the place of every word."""
    places = {word: place for place, word in enumerate(dict.fromkeys(words))}
    return np.array([places[word] for word in words], np.int64), tuple(map(repr, places))


def epsilons(own: float) -> np.ndarray:
    """Thresholds of a share that a reader can choose from: fine near zero, every hundredth, and the run's own."""
    grid = np.concatenate([np.arange(1, 10) / 1000, np.arange(1, 100) / 100])
    return with_own(grid, own)


def with_own(grid: np.ndarray, own: float) -> np.ndarray:
    """The grid, ascending, with `own` in place of what differs from it by rounding only."""
    return np.unique(np.append(grid[~np.isclose(grid, own, rtol=0, atol=1e-12)], own))
