"""What the statistics ask of a block of weights."""

from __future__ import annotations

from .spec import Stat

PER_KEY = frozenset(stat for stat in Stat if stat.startswith("received")) | {Stat.TOP1}
ENTROPIES = frozenset({Stat.ENTROPY, Stat.ENTROPY_NORMALISED})
FROM_PRODUCT = ENTROPIES | {Stat.RECEIVED_LOG}
FROM_NORM = FROM_PRODUCT | {Stat.LSE, Stat.LEARNED_SINK}
# Those that need a second buffer of the size of the block.
SCRATCHED = frozenset({Stat.RECEIVED_SQUARED, Stat.RECEIVED_MAX, Stat.GROUP_OUTPUT})


def asks_peak(stats: frozenset[Stat]) -> bool:
    """Whether `Block.peak` is read."""
    return not stats.isdisjoint({Stat.TOP1, Stat.ROW_MAX})


def asks_norm(stats: frozenset[Stat]) -> bool:
    """Whether the log-sum-exp is read, if it is not known beforehand."""
    return not stats.isdisjoint(FROM_NORM)


def reads_logits(stats: frozenset[Stat]) -> bool:
    """Whether `Block.logits` is read, or used as scratch beside the weights."""
    return not stats.isdisjoint(FROM_PRODUCT | SCRATCHED)
