"""Two sets of tokens on the same pictures: how often they meet, and how often they would by chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

DRAWS, SEED = 10_000, 0


@dataclass(frozen=True)
class Table:
    """Tokens by whether they are in the first set (the vision tower's sinks) and in the second (the language model's).

    Attributes:
        by_chance: Expected number in both if either set lay on the tokens of its picture at random.
    """

    both: int
    first_only: int
    second_only: int
    neither: int
    by_chance: float

    def __add__(self, other: Table) -> Table:
        return Table(
            self.both + other.both,
            self.first_only + other.first_only,
            self.second_only + other.second_only,
            self.neither + other.neither,
            self.by_chance + other.by_chance,
        )

    def row(self) -> dict[str, Any]:
        return {
            "both": self.both,
            "tower_only": self.first_only,
            "llm_only": self.second_only,
            "neither": self.neither,
            "both_by_chance": self.by_chance,
        }


def table(first: Bool[np.ndarray, " token"], second: Bool[np.ndarray, " token"]) -> Table:
    """The table of one picture."""
    tokens = max(len(first), 1)
    return Table(
        int((first & second).sum()),
        int((first & ~second).sum()),
        int((~first & second).sum()),
        int((~first & ~second).sum()),
        float(first.sum() * second.sum() / tokens),
    )


def by_placement(tables: Sequence[Table]) -> float:
    """How likely random placement within each picture gives as many in both, or more: drawn 10000 times.

    Sizes of both sets are kept in every picture, so pictures with many sinks do not decide by themselves.
    """
    observed = sum(item.both for item in tables)
    draws = np.zeros(DRAWS, dtype=np.int64)
    generator = np.random.default_rng(SEED)
    for item in tables:
        first, second = item.both + item.first_only, item.both + item.second_only
        tokens = first + item.second_only + item.neither
        if first and second:
            draws += generator.hypergeometric(first, tokens - first, second, size=DRAWS)
    return float((1 + (draws >= observed).sum()) / (1 + DRAWS))
