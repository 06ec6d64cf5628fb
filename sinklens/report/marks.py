"""Lists of places such as `[[layer, head, share], ...]` as short labels: L2H0 100 %."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .numbers import number, percent

SHOWN, KEPT = 16, 240
"""Labels shown at once, and in the page at all; the downloads have all."""


@dataclass(frozen=True)
class Mark:
    """One place; `value` is "" if the list has none, `link` leads to the place on the map of heads."""

    label: str
    value: str
    link: str | None


@dataclass(frozen=True)
class Marks:
    """A list of places under its name, largest value first; `total` counts those that are left out too."""

    name: str
    items: tuple[Mark, ...]
    total: int

    @property
    def first(self) -> tuple[Mark, ...]:
        return self.items[:SHOWN]

    @property
    def rest(self) -> tuple[Mark, ...]:
        return self.items[SHOWN:]


def marks(key: str, value: Any, called: str | None = None, *, of_heads: bool = False) -> Marks | None:
    """The labels of a list of `[layer, head]` or `[layer, head, number]`, None if it is anything else.

    The key must speak of heads or of experts; then the second number is an expert (L2E7). Numbers that all lie
    between 0 and 1 are read as shares.

    Args:
        called: Name of the list in front of readers, by default the key in words.
        of_heads: Pairs under any key are heads: the finding is about heads.
    """
    experts = "expert" in key
    named = experts or of_heads or "head" in key
    if not named or not isinstance(value, list) or not value or not all(_is_place(item) for item in value):
        return None
    shares = all(0 <= item[2] <= 1 for item in value if len(item) == 3)
    order = sorted(value, key=lambda item: (*(-part for part in item[2:]), item[0], item[1]))
    found = tuple(_mark(item, experts, shares) for item in order[:KEPT])
    return Marks(called or key.replace("_", " "), found, len(value))


def _mark(item: list[Any], experts: bool, shares: bool) -> Mark:
    name = f"L{item[0]}{'E' if experts else 'H'}{item[1]}"
    shown = ""
    if len(item) == 3:
        shown = f"{percent(100.0 * item[2])} %" if shares else number(item[2])
    return Mark(name, shown, None if experts else f"#{name}")


def _is_place(item: Any) -> bool:
    if not isinstance(item, list) or len(item) not in (2, 3):
        return False
    indices = all(isinstance(part, int) and not isinstance(part, bool) and part >= 0 for part in item[:2])
    return indices and all(
        isinstance(part, int | float) and not isinstance(part, bool) and math.isfinite(part)
        for part in item[2:]
    )
