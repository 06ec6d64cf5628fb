"""What several analyzers read from a trace in the same way: attention columns, norm sinks, strong entries."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord

Z95 = 1.959964
"""Standard errors on either side of an estimate that hold the truth 95 times in 100, if it is normal."""


@dataclass(frozen=True)
class Column:
    """One position over the prompts in which enough queries see it.

    Attributes:
        alpha: Mean attention received, NaN in layers without attention. In prompts that did not keep the position
            it is 0: there no head gave it as much as to any position kept.
        top1: Share of the queries that see it whose largest weight is on it, likewise.
        share: Mean over layers and heads, exact in all prompts.
        uniform: The share uniform attention would give it, mean over layers.
        error: Standard errors of `alpha`, 0 where all query rows were looked at.
    """

    position: int
    alpha: Float[np.ndarray, "prompt layer head"]
    top1: Float[np.ndarray, "prompt layer head"]
    share: Float[np.ndarray, " prompt"]
    uniform: Float[np.ndarray, " prompt"]
    error: Float[np.ndarray, "prompt layer head"]

    @property
    def share_error(self) -> float:
        """Standard error of the mean share, at most: heads and layers read the same rows, prompts rows of their own."""
        return float(np.sqrt(np.square(np.nanmean(self.error, (1, 2))).sum()) / len(self.error))

    def rate_between(self, epsilon: float) -> tuple[float, float]:
        """The rate, in percent, of what is above epsilon beyond doubt and of what may be: 1.96 standard errors."""
        known = ~np.isnan(self.alpha)
        away, error = self.alpha[known] - epsilon, Z95 * self.error[known]
        low, high = (float(100 * (away > shift).mean()) if known.any() else 0.0 for shift in (error, -error))
        return low, high

    def rate(self, epsilon: float) -> float:
        """Sink^epsilon in percent: threshold first, then average; layers without attention have no vote."""
        known = ~np.isnan(self.alpha)
        return float(100 * (self.alpha[known] > epsilon).mean()) if known.any() else 0.0

    def rates(self, epsilon: float) -> Float[np.ndarray, " prompt"]:
        """The same per prompt."""
        known = ~np.isnan(self.alpha[0, :, 0])
        return 100 * (self.alpha[:, known] > epsilon).mean((1, 2))

    def heads(self, epsilon: float, lift: float, prompts: float) -> list[tuple[int, int, float]]:
        """Heads that exceed epsilon, and `lift` times uniform, in at least this share of the prompts.

        Returns:
            Layer, head, and the share of prompts.
        """
        above = self.alpha > np.maximum(epsilon, lift * self.uniform[:, None, None])
        share = above.mean(0)
        return [(int(i), int(j), float(share[i, j])) for i, j in np.argwhere(share >= max(prompts, 1e-9))]


@dataclass(frozen=True)
class SinkEvidence:
    """The kept positions of one prompt, ready for thresholds."""

    record: PromptRecord
    positions: Int[np.ndarray, " kept"]
    alpha: Float[np.ndarray, "layer head kept"]
    visible: Int[np.ndarray, " pos"]
    uniform: Float[np.ndarray, " pos"]
    left_out: float
    """The largest share any head gives to a position that was not kept (and that enough queries see), else 0."""

    @property
    def length(self) -> int:
        return len(self.record)

    def is_seen(self, position: int, min_visible: int) -> bool:
        """Whether the prompt has the position and enough queries see it; under a short window that is all it can."""
        return position < self.length and bool(self.visible[position] >= min(min_visible, self.visible.max()))

    def alpha_at(self, position: int) -> Float[np.ndarray, "layer head"]:
        """Attention received by a position, 0 if it was not kept."""
        return self._at(self.alpha, position)

    def error_at(self, position: int) -> Float[np.ndarray, "layer head"]:
        """Standard error of that, 0 where all query rows were looked at."""
        errors = self.record.arrays.get(sig.ATTENTION_RECEIVED.name + sig.ERROR)
        return self._at(np.zeros_like(self.alpha) if errors is None else errors, position)

    def top1_at(self, position: int) -> Float[np.ndarray, "layer head"]:
        return self._at(self.record[sig.ATTENTION_TOP1], position)

    def share_at(self, position: int) -> float:
        """Mean over layers and heads; for a position that was not kept, with the diagonal and the true divisor."""
        if position in self.positions:
            return float(np.nanmean(self.alpha_at(position)))
        return float(np.nanmean(self.record[sig.ATTENTION_RECEIVED_MEAN][:, position]))

    def _at(
        self, values: Float[np.ndarray, "layer head kept"], position: int
    ) -> Float[np.ndarray, "layer head"]:
        i = int(np.searchsorted(self.positions, position))
        if i < len(self.positions) and self.positions[i] == position:
            return values[:, :, i]
        return np.where(np.isnan(values[:, :, 0]), np.nan, 0.0)


def column(evidence: list[SinkEvidence], position: int, min_visible: int) -> Column:
    """A position over all prompts in which at least `min_visible` queries see it (there must be one)."""
    holders = [item for item in evidence if item.is_seen(position, min_visible)]
    return Column(
        position,
        np.stack([item.alpha_at(position) for item in holders]),
        np.stack([item.top1_at(position) for item in holders]),
        np.array([item.share_at(position) for item in holders]),
        np.array([item.uniform[position] for item in holders]),
        np.stack([item.error_at(position) for item in holders]),
    )


def gather(
    record: PromptRecord, *, min_visible: int, code_divisor: bool = False, exclude_diagonal: bool = False
) -> SinkEvidence:
    """Read one prompt's attention columns.

    Args:
        min_visible: Positions seen by fewer queries do not count as left out.
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
    enough = min(min_visible, visible.max())
    others = np.setdiff1d(np.flatnonzero(visible.max(0) >= enough), positions)
    return SinkEvidence(
        record,
        positions,
        alpha,
        visible.max(0).astype(int),
        uniform_received(visible),
        float(record[sig.ATTENTION_RECEIVED_PEAK][others].max(initial=0.0)),
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
