"""From a block of attention weights to the statistics. One pass per statistic, and only for those asked for.

Every formula works on weights `P` with `log P = logits - norm` and `A = factor * P`, so that the same code
serves a softmax over visible keys (`sum P = 1`, `factor` carries learned sinks) and weights that are `A`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .groups import KeyGroups
from .shapes import Sizes
from .spec import AttentionCall, AttentionStatistics, Stat, Want
from .visibility import Visibility
from .walk import Chunk
from .workspace import workspace

PER_KEY = frozenset(stat for stat in Stat if stat.startswith("received")) | {Stat.TOP1}
_NEED_PEAK = frozenset({Stat.TOP1, Stat.ROW_MAX})
_NEED_NORM = frozenset({Stat.LSE, Stat.ENTROPY, Stat.RECEIVED_LOG, Stat.LEARNED_SINK})
_CHUNK = 64


@dataclass(frozen=True)
class Peak:
    """Largest entry of each row: its key (counted from the block's first), logit and weight."""

    index: Int[Tensor, "b h r"]
    logit: Float[Tensor, "b h r"]
    weight: Float[Tensor, "b h r"]


@dataclass
class Block:
    """Some rows of some heads. The logits are scratch once their statistics are taken.

    Attributes:
        rows, keys: The ranges covered; keys outside have weight 0.
        weights: `P`, `[b, h, r, k]`.
        logits: `(log P + norm) / unit`, hidden keys very negative but finite.
        norm: `[b, h, r]`; None if 0.
        factor: `A / P`, `[b, h, r]`; None if 1.
        mass: `sum_k P`, `[b, h, r]`; None if 1.
        sink: Mass on the learned sink, `[b, h, r]`; None without.
        lse: Log-sum-exp with learned sinks; None if nobody asks.
        unit: Nats per unit of the logits: 1, or ln 2 where they are logarithms to base 2.
    """

    chunk: Chunk
    rows: slice
    keys: slice
    weights: Float[Tensor, "b h r k"]
    logits: Float[Tensor, "b h r k"]
    peak: Peak | None = None
    norm: Float[Tensor, "b h r"] | None = None
    factor: Float[Tensor, "b h r"] | None = None
    mass: Float[Tensor, "b h r"] | None = None
    sink: Float[Tensor, "b h r"] | None = None
    lse: Float[Tensor, "b h r"] | None = None
    unit: float = 1.0


def needs_peak(stats: frozenset[Stat]) -> bool:
    """Whether `Block.peak` is read."""
    return bool(stats & _NEED_PEAK)


def needs_norm(stats: frozenset[Stat]) -> bool:
    """Whether `Block.norm` is read."""
    return bool(stats & _NEED_NORM)


def row_peaks(logits: Float[Tensor, "b h r k"], weights: Float[Tensor, "b h r k"]) -> Peak:
    """Largest logit of each row, the first on ties, and the weight there.

    On CPU a plain maximum is vectorised and an arg-max is not, so the arg-max runs over the maxima of 64 keys
    each, and then over the 64 keys of the winner.
    """
    keys = logits.shape[3]
    if logits.device.type != "cpu" or keys < 4 * _CHUNK:
        logit, index = logits.max(-1)
        return Peak(index, logit, _pick(weights, index))
    rest = keys % _CHUNK
    tops = logits[..., : keys - rest].unflatten(-1, (-1, _CHUNK)).amax(-1)
    if rest:
        tops = torch.cat([tops, logits[..., keys - rest :].amax(-1, keepdim=True)], -1)
    logit, chunk = tops.max(-1)
    if rest:
        # The last chunk is short: its last key is then looked at repeatedly, which changes no arg-max.
        columns = chunk[..., None] * _CHUNK + torch.arange(_CHUNK, device=logits.device)
        inner = logits.gather(-1, columns.clamp_(max=keys - 1)).argmax(-1)
    else:
        each = torch.arange(chunk.numel(), device=logits.device) * tops.shape[-1]
        inner = logits.view(-1, _CHUNK).index_select(0, each + chunk.flatten()).max(-1).indices
    index = chunk * _CHUNK + inner.view_as(chunk)
    return Peak(index, logit, _pick(weights, index))


def _pick(table: Tensor, index: Tensor) -> Tensor:
    return table.gather(-1, index[..., None])[..., 0]


class Accumulator:
    """Collects the statistics of one call, block by block, in any order."""

    def __init__(
        self, call: AttentionCall, want: Want, sizes: Sizes, view: Visibility, value: Tensor
    ) -> None:
        self.want, self.sizes, self.view = want, sizes, view
        self.values = {stat: self._empty(stat, value) for stat in want.stats}
        grouped = want.stats & {Stat.GROUP_MASS, Stat.GROUP_OUTPUT}
        self.groups = KeyGroups(want, sizes, value) if grouped else None
        # Where a row of a head does not count. None spares all the bookkeeping in the ordinary case.
        self._live: Tensor | None = None
        if call.counted is not None or view.seen is not None:
            self._live = view.rows[:, None] if view.seen is None else view.rows[:, None] & view.seen
        self._tail, self._tail_start = self._tail_rows()

    def add(self, block: Block) -> None:
        """Take all statistics of a block."""
        live = None
        if self._live is not None:
            live = self._live[block.chunk.batch, :, block.rows]
            live = live[:, block.chunk.heads] if live.shape[1] > 1 else live
            live = live.expand(block.weights.shape[:3])
        weight = torch.ones_like(block.weights[..., 0]) if block.factor is None else block.factor
        if live is not None:
            weight = torch.where(live, weight, 0.0)
        self._rows(block, live)
        self._columns(block, weight)
        if Stat.TOP1 in self.values and block.peak is not None:
            votes = torch.ones_like(weight) if live is None else live.to(weight.dtype)
            self._into(Stat.TOP1, block).scatter_add_(-1, block.peak.index, votes)
        self._products(block, live, weight)
        self._squares(block, weight)
        if self.groups is not None and Stat.GROUP_OUTPUT in self.values:
            found = self.groups.output(block.weights, block.chunk, block.keys, block.logits)
            self._put(Stat.GROUP_OUTPUT, block, live, found)

    def finish(self) -> AttentionStatistics:
        """The statistics, all blocks being in."""
        values = {stat: value.to(torch.float32) for stat, value in self.values.items()}
        return AttentionStatistics(values, self.view.counts, self.view.rows)

    def _empty(self, stat: Stat, like: Tensor) -> Tensor:
        sizes, groups = self.sizes, self.want.groups
        shape: tuple[int, ...] = (sizes.batch, sizes.heads, sizes.keys if stat in PER_KEY else sizes.queries)
        if stat in (Stat.GROUP_MASS, Stat.GROUP_OUTPUT) and groups is not None:
            shape += (groups.shape[0],)
        if stat is Stat.GROUP_OUTPUT:
            shape += (sizes.value_dim,)
        return like.new_zeros(shape)

    def _tail_rows(self) -> tuple[Tensor | None, int]:
        """The last `tail` counted rows of each batch row, and the first row that is one of them anywhere."""
        if Stat.RECEIVED_TAIL not in self.values:
            return None, 0
        rows = self.view.rows
        tail = rows & (rows.flip(1).cumsum(1).flip(1) <= self.want.tail)
        some = tail.any(0)
        return tail, int(some.to(torch.uint8).argmax()) if bool(some.any()) else self.sizes.queries

    def _into(self, stat: Stat, block: Block) -> Tensor:
        """The part of a per-key statistic that a block adds to."""
        return self.values[stat][block.chunk.batch, block.chunk.heads, block.keys]

    def _put(
        self, stat: Stat, block: Block, live: Tensor | None, found: Tensor, *, scaled: bool = True
    ) -> None:
        """Store a per-row statistic of `P`; `scaled` says that it is linear in the weights."""
        more = (None,) * (found.ndim - 3)
        if scaled and block.factor is not None:
            found = found * block.factor[(..., *more)]
        if live is not None:
            found = torch.where(live[(..., *more)], found, 0.0)
        self.values[stat][block.chunk.batch, block.chunk.heads, block.rows] = found

    def _rows(self, block: Block, live: Tensor | None) -> None:
        """Per-row statistics that leave weights and logits alone."""
        wanted = self.values
        if Stat.ROW_MAX in wanted and block.peak is not None:
            self._put(Stat.ROW_MAX, block, live, block.peak.weight)
        if Stat.DIAGONAL in wanted:
            self._put(Stat.DIAGONAL, block, live, self._diagonal(block))
        if Stat.DISTANCE in wanted:
            self._put(Stat.DISTANCE, block, live, self._distance(block))
        if Stat.DISTANCE_WINDOWED in wanted:
            self._put(Stat.DISTANCE_WINDOWED, block, live, self._distance_windowed(block))
        if Stat.LSE in wanted and block.lse is not None:
            self._put(Stat.LSE, block, live, block.lse, scaled=False)
        if Stat.LEARNED_SINK in wanted and block.sink is not None:
            self._put(Stat.LEARNED_SINK, block, live, block.sink, scaled=False)
        if Stat.GROUP_MASS in wanted and self.groups is not None:
            self._put(Stat.GROUP_MASS, block, live, self.groups.mass(block.weights, block.chunk, block.keys))

    def _columns(self, block: Block, weight: Tensor) -> None:
        """Weighted sums over rows. A product with a vector of weights is faster than a reduction."""
        wanted: list[tuple[Stat, Tensor]] = []
        if Stat.RECEIVED in self.values:
            wanted.append((Stat.RECEIVED, weight))
        if self._tail is not None and block.rows.stop > self._tail_start:
            tail = self._tail[block.chunk.batch, None, block.rows]
            wanted.append((Stat.RECEIVED_TAIL, torch.where(tail, weight, 0.0)))
        if wanted:
            sums = _sum_rows(torch.stack([rows for _, rows in wanted], 2), block.weights)
            for i, (stat, _) in enumerate(wanted):
                self._into(stat, block).add_(sums[:, :, i])

    def _products(self, block: Block, live: Tensor | None, weight: Tensor) -> None:
        """Entropy of rows and columns: both are sums of `P log P`. Overwrites the logits."""
        if not self.values.keys() & {Stat.ENTROPY, Stat.RECEIVED_LOG}:
            return
        log_factor = None if block.factor is None else block.factor.clamp_min(1e-38).log()
        norm = block.norm
        if Stat.RECEIVED_LOG in self.values and norm is not None:
            block.logits.sub_(norm[..., None] / block.unit)  # log P before the product: subtracting sums would cancel
            norm = None
        product = block.logits.mul_(block.weights)
        if Stat.RECEIVED_LOG in self.values:
            into = self._into(Stat.RECEIVED_LOG, block)
            into.add_(_sum_rows(weight[:, :, None], product)[:, :, 0], alpha=block.unit)
            if log_factor is not None:
                into.add_(_sum_rows((weight * log_factor)[:, :, None], block.weights)[:, :, 0])
        if Stat.ENTROPY in self.values:
            surprise = product.sum(-1) * -block.unit
            if norm is not None:
                surprise = surprise + (norm if block.mass is None else norm * block.mass)
            if log_factor is not None:
                surprise = surprise - (log_factor if block.mass is None else log_factor * block.mass)
            self._put(Stat.ENTROPY, block, live, surprise)

    def _squares(self, block: Block, weight: Tensor) -> None:
        """Second moments and maxima over rows. Overwrites the logits."""
        if Stat.RECEIVED_SQUARED in self.values:
            square = torch.mul(block.weights, block.weights, out=block.logits)
            found = _sum_rows(weight.square()[:, :, None], square)
            self._into(Stat.RECEIVED_SQUARED, block).add_(found[:, :, 0])
        if Stat.RECEIVED_MAX in self.values:
            weights = block.weights
            if block.factor is not None or self._live is not None:
                weights = torch.mul(weights, weight[..., None], out=block.logits)
            into = self._into(Stat.RECEIVED_MAX, block)
            torch.maximum(into, weights.amax(2), out=into)

    def _diagonal(self, block: Block) -> Tensor:
        """`P` at each row's own key, 0 where the block does not hold it."""
        b, h, r, k = block.weights.shape
        shift = block.rows.start + self.sizes.offset - block.keys.start
        found = block.weights.new_zeros(b, h, r)
        if -r < shift < k:
            line = block.weights.diagonal(shift, 2, 3)
            first = max(0, -shift)
            found[..., first : first + line.shape[-1]] = line
        return found

    def _distance(self, block: Block) -> Tensor:
        """Mean of row less key position, taken relative to the block so that near keys stay exact."""
        weights, origin = block.weights, block.rows.start + self.sizes.offset
        back = origin - torch.arange(
            block.keys.start, block.keys.stop, device=weights.device, dtype=weights.dtype
        )
        mean = (weights.view(-1, weights.shape[-1]) @ back).view(weights.shape[:3])
        ahead = torch.arange(weights.shape[2], device=weights.device, dtype=weights.dtype)
        return mean + (ahead if block.mass is None else ahead * block.mass)

    def _distance_windowed(self, block: Block) -> Tensor:
        """`min(d, w) = w - relu(w - d)`: only keys nearer than the window have to be looked at."""
        window, device = self.want.window, block.weights.device
        first = max(block.keys.start, block.rows.start + self.sizes.offset - window + 1)
        total = torch.ones((), device=device) if block.mass is None else block.mass
        if first >= block.keys.stop:
            return (window * total).expand(block.weights.shape[:3])
        place = torch.arange(block.rows.start, block.rows.stop, device=device)[:, None] + self.sizes.offset
        key = torch.arange(first, block.keys.stop, device=device)
        short = (window - (place - key)).clamp_min(0).to(block.weights.dtype)
        near = block.weights[..., first - block.keys.start :]
        return window * total - torch.einsum("bhrk,rk->bhr", near, short)


def _sum_rows(weight: Float[Tensor, "b h m r"], matrix: Float[Tensor, "b h r k"]) -> Float[Tensor, "b h m k"]:
    """`sum_r weight[r] matrix[r, k]` for `m` sets of weights, in a buffer that the next call overwrites."""
    b, h, r, k = matrix.shape
    out = workspace().take("row sums", (b * h, weight.shape[2], k), matrix.dtype, matrix.device)
    torch.bmm(weight.reshape(b * h, -1, r), matrix.view(b * h, r, k), out=out)
    return out.view(b, h, -1, k)
