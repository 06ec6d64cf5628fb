"""Which query rows of a prompt are looked at where statistics are estimated (`sampled.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from jaxtyping import Int

from ..core.errors import UsageError

LEADING, TAIL = 16, 64
"""Rows that are always taken: the first, whose few keys get most, and the last, of which some statistics are alone."""
LEAST_ROWS = LEADING + TAIL + 16
"""Fewest rows of a sample."""
_LEAST_DRAWN, _MOST_DRAWN, _STRATA = 8, 64, 64


@dataclass(frozen=True)
class Stratum:
    """Neighbouring query rows of which some were drawn.

    Attributes:
        rows: Those drawn, ascending.
        size: Rows in the stratum.
    """

    rows: Int[np.ndarray, " drawn"]
    size: int

    @property
    def factor(self) -> float:
        """Variance of the estimated total, as a multiple of the variance within the stratum."""
        drawn = len(self.rows)
        return self.size * self.size * (1 - drawn / self.size) / drawn


@dataclass(frozen=True)
class RowSample:
    """The rows of one prompt that are looked at."""

    strata: tuple[Stratum, ...]

    @property
    def rows(self) -> Int[np.ndarray, " drawn"]:
        """All of them, ascending."""
        return np.concatenate([stratum.rows for stratum in self.strata])

    def at(self, places: Int[np.ndarray, " pos"]) -> RowSample:
        """The same rows of a prompt that stands at these places of a padded row."""
        return RowSample(tuple(replace(stratum, rows=places[stratum.rows]) for stratum in self.strata))


def draw_rows(length: int, drawn: int, seed: Sequence[int]) -> RowSample | None:
    """A sample of a prompt's rows; None where it would be all of them.

    Args:
        length: Rows of the prompt.
        drawn: Rows to take, at least `LEAST_ROWS`.
        seed: Seeds of the generator; the same ones give the same rows.

    Raises:
        UsageError: Too few rows.
    """
    if drawn >= length:
        return None
    if drawn < LEAST_ROWS:
        raise UsageError(
            f"A sample of {drawn} query rows is too small; it takes at least {LEAST_ROWS}.",
            detail=f"The first {LEADING} and the last {TAIL} rows are always taken.",
        )
    generator = np.random.default_rng(list(seed))
    free, wanted = length - LEADING - TAIL, drawn - LEADING - TAIL
    count = max(min(_STRATA, wanted // _LEAST_DRAWN), -(-wanted // _MOST_DRAWN))
    ends = [wanted * i // count for i in range(count + 1)]
    strata = [Stratum(np.arange(LEADING), LEADING)]
    for first, last in pairwise(ends):
        # As many of the rows as of those drawn, so that all weigh nearly the same.
        start, stop = free * first // wanted, free * last // wanted
        some = generator.choice(stop - start, last - first, replace=False)
        strata.append(Stratum(np.sort(some) + start + LEADING, stop - start))
    strata.append(Stratum(np.arange(length - TAIL, length), TAIL))
    return RowSample(tuple(strata))
