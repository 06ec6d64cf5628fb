"""What several analyzers read from a trace in the same way: attention columns, norm sinks, strong entries."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord


@dataclass(frozen=True)
class Column:
    """One position of one prompt.

    Attributes:
        alpha: Mean attention received, NaN in layers without attention.
        top1: Share of the queries that see it whose largest weight is on it.
        uniform: The share uniform attention would give it, mean over layers.
    """

    alpha: Float[np.ndarray, "layer head"]
    top1: Float[np.ndarray, "layer head"]
    uniform: float

    @property
    def share(self) -> float:
        return float(np.nanmean(self.alpha))


@dataclass(frozen=True)
class SinkEvidence:
    """The kept positions of one prompt, ready for thresholds."""

    record: PromptRecord
    positions: Int[np.ndarray, " kept"]
    alpha: Float[np.ndarray, "layer head kept"]
    visible: Int[np.ndarray, " kept"]
    uniform_all: Float[np.ndarray, " pos"]
    smallest_kept: float
    """Mean share of the weakest kept position if any position was left out, else 0: a bound on what is missing."""

    @property
    def length(self) -> int:
        return len(self.record)

    @property
    def share(self) -> Float[np.ndarray, " kept"]:
        return np.nanmean(self.alpha, axis=(0, 1))

    @property
    def uniform(self) -> Float[np.ndarray, " kept"]:
        return self.uniform_all[self.positions]

    def uniform_at(self, position: int) -> float:
        return float(self.uniform_all[position])

    def rate(self, epsilon: float) -> Float[np.ndarray, " kept"]:
        """Share of heads above epsilon, per kept position; layers without attention have no vote."""
        attending = ~np.isnan(self.alpha[:, 0, 0])
        return (self.alpha[attending] > epsilon).mean((0, 1))

    def at(self, position: int) -> Column:
        i = int(np.searchsorted(self.positions, position))
        top1 = self.record.arrays.get(sig.ATTENTION_TOP1.name)
        return Column(
            self.alpha[:, :, i],
            top1[:, :, i] if top1 is not None else np.full_like(self.alpha[:, :, i], np.nan),
            self.uniform_at(position),
        )


def gather(
    record: PromptRecord, *, code_divisor: bool = False, exclude_diagonal: bool = False
) -> SinkEvidence:
    """Read one prompt's attention columns.

    Args:
        code_divisor: Divide by T - k, as the official sink-rate code does, instead of by the queries that see k.
        exclude_diagonal: Leave out the position's attention to itself (and one query from the divisor).
    """
    positions = record[sig.KEPT_POSITIONS]
    visible = record[sig.VISIBLE_QUERIES].astype(np.float64)
    alpha = record[sig.ATTENTION_RECEIVED].astype(np.float64)
    seen = visible[:, None, positions]
    if exclude_diagonal:
        alpha = (alpha * seen - record[sig.ATTENTION_SELF]) / np.maximum(seen - 1, 1)
    elif code_divisor:
        alpha = alpha * seen / (len(record) - positions)
    mean = np.nanmean(record[sig.ATTENTION_RECEIVED_MEAN], axis=0)
    left_out = len(positions) < len(record)
    return SinkEvidence(
        record,
        positions,
        alpha,
        visible.max(0)[positions].astype(int),
        uniform_received(visible),
        float(mean[positions[16:]].min(initial=np.inf)) if left_out and len(positions) > 16 else 0.0,
    )


def uniform_received(visible: Float[np.ndarray, "layer pos"]) -> Float[np.ndarray, " pos"]:
    """What each position would receive if every query spread its attention evenly, mean over layers.

    A query that sees n keys gives each 1/n. The counts of queries per key tell n for causal attention, with or
    without a window, and for full bidirectional attention; for other patterns the mean row length stands in.
    """
    return np.mean(
        [_uniform_layer(counts) for counts in visible if counts.min() >= 0 and counts.any()], axis=0
    )


def _uniform_layer(counts: Float[np.ndarray, " pos"]) -> Float[np.ndarray, " pos"]:
    length, window = len(counts), int(counts[0])
    position = np.arange(length)
    if not np.array_equal(counts, np.minimum(length - position, window)):
        # Bidirectional: every row has T keys. Anything else: rows of the mean length, which is exact for it too.
        return np.full(length, length / counts.sum())
    share = np.concatenate([[0.0], np.cumsum(1.0 / np.minimum(position + 1, window))])
    last = np.minimum(position + window, length)
    return (share[last] - share[:length]) / np.maximum(counts, 1)


def norm_sinks(records: Iterable[PromptRecord], ratio: float, *, share: float = 0.5) -> set[int]:
    """Positions whose hidden-state norm exceeds `ratio` times the median token's on two consecutive layers or
    more, in at least `share` of the prompts that have the position."""
    hits: dict[int, int] = {}
    holders: dict[int, int] = {}
    for record in records:
        norm = record[sig.RESIDUAL_NORM]
        above = norm / np.median(norm, axis=1, keepdims=True) > ratio
        lasting = np.any(above[1:] & above[:-1], axis=0) if len(above) > 1 else above[0]
        for position, hit in enumerate(np.atleast_1d(lasting)):
            holders[position] = holders.get(position, 0) + 1
            hits[position] = hits.get(position, 0) + int(hit)
    return {position for position, n in hits.items() if n and n >= share * holders[position]}


def span(first: int | None, last: int | None) -> str:
    """`layer 2` or `layers 2 to 5`."""
    return f"layer {first}" if first == last else f"layers {first} to {last}"
