"""What an attention kernel is given and what it returns: the contract that all kernels share.

The dense reference (`reference.py`) is the definition; the blocked kernels (`blocked.py`) must equal it.

Axis names: `batch head kv_head query key dim value_dim group`. Query row `q` sits at key position
`q + (key - query)`: a decode chunk is the end of its sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .edits import MapEdit
from .sample import TAIL, RowSample


class Stat(StrEnum):
    """A reduction of the attention weights `A[head, query, key]`; the comment gives shape and definition.

    Sums over queries run over *counted* rows only (`AttentionCall.counted`), so padding never enters.
    Per-row values of rows that are not counted, or that see no key, are 0.
    """

    RECEIVED = "received"  # batch head key: sum_q A
    RECEIVED_SQUARED = "received_squared"  # batch head key: sum_q A^2
    RECEIVED_LOG = "received_log"  # batch head key: sum_q A log A (nats), for the column entropy
    RECEIVED_TAIL = "received_tail"  # batch head key: sum of A over the last `tail` counted rows
    RECEIVED_ROWS = "received_rows"  # batch head key: sum of A over the counted rows among `probes`
    RECEIVED_BAND = (
        "received_band"  # batch head key: sum of A over counted rows `band` positions after the key
    )
    RECEIVED_BAND_REST = "received_band_rest"
    # batch head key: the same of A p / L, 0 in groups[0]; L = 1 - mass of the row on groups[0], p = `part_left(L)`
    RECEIVED_MAX = "received_max"  # batch head key: max_q A
    TOP1 = "top1"  # batch head key: counted rows whose largest weight is at key (first key on ties)
    DIAGONAL = "diagonal"  # batch head query: A[q, q + key - query]
    ENTROPY_NORMALISED = (
        "entropy_normalised"  # batch head query: ENTROPY / ln(keys the row sees), 0 for one key
    )
    ENTROPY = "entropy"  # batch head query: -sum_k A log A (nats)
    DISTANCE = "distance"  # batch head query: sum_k A (position of q - k), tokens
    DISTANCE_WINDOWED = "distance_windowed"  # batch head query: sum_k A min(position of q - k, window)
    ROW_MAX = "row_max"  # batch head query: max_k A
    LSE = "lse"  # batch head query: log sum_k exp(z), learned sinks included (nats); of the logits before any edit
    LEARNED_SINK = "learned_sink"  # batch head query: mass on a learned sink logit, 1 - sum_k A without edits
    GROUP_MASS = "group_mass"  # batch head query group: sum_{k in group} A
    GROUP_OUTPUT = "group_output"  # batch head query group value_dim: sum_{k in group} A v_k


LEAST_LEFT = 1e-4
"""Least mass beside a group of keys with which a row can tell how it spreads what is left."""


def part_left(left: Tensor) -> Tensor:
    """The weight of rows that leave `left` beside the first group, in what is averaged over such rows.

    A row that leaves less than `LEAST_LEFT` is left out: its rest is the smallest numbers of a softmax divided by
    each other. One that leaves twice as much counts in full. Between the two it counts in part, so that rounding
    does not decide whether a row takes part. A mean divides by the sum of these weights and not by the number of rows.
    """
    return (left / LEAST_LEFT - 1.0).clamp(0.0, 1.0)


@dataclass(frozen=True)
class AttentionCall:
    """One softmax attention over post-RoPE, post-cache tensors.

    Attributes:
        query, key, value: Key and value heads may be fewer than query heads (GQA); head `h` reads
            key head `h // (heads / kv_heads)`. The value width may differ from the key width (MLA).
        scale: Factor on `q·k`, always explicit.
        causal: Key `k` is visible to row `q` iff `k <= q + key - query`. Used only if `mask` is None.
        mask: Boolean (True = visible) or additive float, broadcastable to batch head query key.
        softcap: Logits become `softcap * tanh(logits / softcap)` before the mask.
        learned_sinks: A logit per head that takes part in the softmax and has no value (GPT-OSS).
        counted: Rows that enter sums over queries; None counts all. Rows without a visible key never count.
        edits: What was done to the map after its softmax, in this order. Statistics are those of the edited map.
    """

    query: Float[Tensor, "batch head query dim"]
    key: Float[Tensor, "batch kv_head key dim"]
    value: Float[Tensor, "batch kv_head key value_dim"]
    scale: float
    causal: bool = True
    mask: Bool[Tensor, "#batch #head #query #key"] | Float[Tensor, "#batch #head #query #key"] | None = None
    softcap: float | None = None
    learned_sinks: Float[Tensor, " head"] | None = None
    counted: Bool[Tensor, "batch query"] | None = None
    edits: tuple[MapEdit, ...] = ()

    @property
    def off_keys(self) -> bool:
        """Whether rows may give mass to something that is no key: a learned sink, or a bias that was added."""
        return self.learned_sinks is not None or any(edit.added is not None for edit in self.edits)


@dataclass(frozen=True)
class Want:
    """Which statistics to compute, and their parameters.

    Attributes:
        stats: The statistics; nothing else is computed.
        groups: Key sets for `GROUP_*`: `[group, batch, key]`, or `[group, batch, head, key]` per query head.
        tail: Number of last counted rows in `RECEIVED_TAIL`.
        window: Cap of the distance in `DISTANCE_WINDOWED`.
        probes: Rows of `RECEIVED_ROWS`.
        band: First and last distance (inclusive, in tokens) of the rows of `RECEIVED_BAND*` from the key.
    """

    stats: frozenset[Stat]
    groups: Bool[Tensor, "group batch key"] | Bool[Tensor, "group batch head key"] | None = None
    tail: int = TAIL
    window: int = 10
    probes: Bool[Tensor, "batch query"] | None = None
    band: tuple[int, int] = (10, 100)


@dataclass
class AttentionStatistics:
    """Results by statistic, float32 (counts too), and the number of counted rows that see each key.

    Attributes:
        values: One tensor per requested statistic, shaped as `Stat` says.
        visible: Counted rows to which the key is visible, integer; the divisor of every "received" mean.
            The head axis is 1 unless the mask differs by head.
        rows: Rows that count: `counted` and at least one visible key.
        variances: Of sums over rows that were estimated from a sample of the rows (`sampled.py`), the estimated
            variance; empty where all rows were taken.
        samples: Per prompt the rows drawn, or None for all; None where nothing was sampled.
    """

    values: dict[Stat, Tensor] = field(default_factory=dict)
    visible: Int[Tensor, "batch visible_head key"] | None = None
    rows: Bool[Tensor, "batch query"] | None = None
    variances: dict[Stat, Tensor] = field(default_factory=dict)
    samples: tuple[RowSample | None, ...] | None = None

    def __getitem__(self, stat: Stat) -> Tensor:
        return self.values[stat]


@dataclass(frozen=True)
class BlockPlan:
    """How a blocked kernel walks the rows.

    Attributes:
        scores: Number of logits in flight, all heads together. Twice that many floats are held as scratch.
        score_dtype: Type of the `q·k` product; logits are float32 in any case.
        native: Use the compiled kernels where they are available (`native.py`, on CUDA `triton_pass.py`); results
            agree to rounding.
    """

    scores: int = 3_200_000
    score_dtype: torch.dtype = torch.float32
    native: bool = True
