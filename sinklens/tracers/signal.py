"""What a signal is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Source(StrEnum):
    """The tap that a signal needs."""

    ATTENTION = "attention"
    RESIDUAL = "residual"
    DOWN_PROJ = "down_proj"
    EXPERTS = "experts"
    VISION = "vision"


@dataclass(frozen=True)
class Signal:
    """One recordable quantity. Signals are compared and stored by name."""

    name: str
    source: Source
    axes: tuple[str, ...]
    unit: str
    meaning: str
