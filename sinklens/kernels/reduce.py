"""From blocks of attention weights to the statistics. One pass per statistic, and only for those asked for.

Every formula works on weights `P` with `A = factor * P`, so that the same code serves a softmax over the
visible keys (`sum P = 1`, `factor` carries learned sinks) and weights that are `A` already. Numbers per row
are collected raw and turned into statistics once, at the end: a block costs few calls besides its passes over
the weights.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from . import native
from .groups import KeyGroups
from .spec import AttentionCall, BlockPlan, Stat, Want
from .workspace import workspace

PER_KEY = frozenset(stat for stat in Stat if stat.startswith("received")) | {Stat.TOP1}
_FROM_PEAK = frozenset({Stat.TOP1, Stat.ROW_MAX})
_FROM_NORM = frozenset({Stat.LSE, Stat.ENTROPY, Stat.RECEIVED_LOG, Stat.LEARNED_SINK})
_FROM_PRODUCT = frozenset({Stat.ENTROPY, Stat.RECEIVED_LOG})
_CHUNK = 64
_TINY = 1e-38


@dataclass(frozen=True)
class Peak:
    """Largest entry of each row: its key (counted from the block's first), logit and weight."""

    index: Int[Tensor, "b h r"]
    logit: Float[Tensor, "b h r"]
    weight: Float[Tensor, "b h r"]

    @property
    def norm(self) -> Float[Tensor, "b h r"]:
        """Log-sum-exp (nats) of the row's logits, if its weights are their softmax."""
        return self.logit - self.weight.log()


@dataclass(frozen=True)
class Block:
    """Some rows of some heads; keys outside of `keys` have weight 0.

    Attributes:
        weights: `P`, `[b, h, r, k]`.
        logits: `log P` plus a constant per row, hidden keys very negative but finite. Overwritten.
        peak: If `needs_peak`.
        factor: `A / P`, `[b, h, r]`; None if 1.
        done: What the compiled row pass has found already; received attention is then added too.
    """

    rows: slice
    keys: slice
    weights: Float[Tensor, "b h r k"]
    logits: Float[Tensor, "b h r k"]
    peak: Peak | None
    factor: Float[Tensor, "b h r"] | None = None
    done: native.RowResults | None = None


def native_serves(call: AttentionCall, want: Want, plan: BlockPlan) -> bool:
    """Whether the compiled row pass can take the place of the torch passes; column entropy needs the logits."""
    ordinary = call.query.device.type == "cpu" and call.query.dtype != torch.float64
    return plan.native and ordinary and Stat.RECEIVED_LOG not in want.stats and native.available()


def needs_peak(stats: frozenset[Stat], *, known: bool) -> bool:
    """Whether `Block.peak` is read; `known` says that the log-sum-exp was given."""
    return bool(stats & _FROM_PEAK) or (not known and bool(stats & _FROM_NORM))


def row_peaks(logits: Float[Tensor, "b h r k"], weights: Float[Tensor, "b h r k"]) -> Peak:
    """Largest logit of each row, the first on ties, and the weight there.

    On CPU a plain maximum is vectorised and one with its place is not, so the place is searched among the
    maxima of 64 keys each, and then among the 64 keys of the winner.
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
        inner = logits.gather(-1, columns.clamp_(max=keys - 1)).max(-1).indices
    else:
        each = torch.arange(chunk.numel(), device=logits.device) * tops.shape[-1]
        inner = logits.view(-1, _CHUNK).index_select(0, each.add_(chunk.flatten())).max(-1).indices
    index = chunk.mul_(_CHUNK).add_(inner.view_as(chunk))
    return Peak(index, logit, _pick(weights, index))


def _pick(table: Tensor, index: Tensor) -> Tensor:
    return table.gather(-1, index[..., None])[..., 0]


def _row_products(
    weights: Float[Tensor, "b h r k"], logits: Float[Tensor, "b h r k"]
) -> Float[Tensor, "b h r"]:
    """`sum_k weights logits` of each row; may overwrite the logits.

    On CPU as the diagonal of the product of each pair of rows with itself: twice the arithmetic, but no pass
    that writes, and torch has no row-wise dot product.
    """
    b, h, r, k = weights.shape
    if weights.device.type != "cpu" or b * h * r % 2 or k < 256:
        return logits.mul_(weights).sum(-1)
    pairs = torch.bmm(weights.view(-1, 2, k), logits.view(-1, 2, k).mT)
    return pairs.diagonal(dim1=1, dim2=2).reshape(b, h, r)


class Accumulator:
    """Collects the statistics of a call (or a chunk of one) from its blocks of rows, last to first.

    Args:
        call: The call; of its rows, `live` count.
        want: The statistics.
        into: Where results go: zeros, shaped as `Stat` says.
        live: Rows that count, by head if that differs; None for all.
        tail: Rows of `RECEIVED_TAIL`, None without.
        groups: Key sets of `GROUP_*`, None without.
        lse: Log-sum-exp with learned sinks (nats), if it was known: then `P` is `A`.
        unit: Nats per unit of the logits: 1, or ln 2 where they are logarithms to base 2.
    """

    def __init__(
        self,
        call: AttentionCall,
        want: Want,
        into: dict[Stat, Tensor],
        *,
        live: Bool[Tensor, "b visible_head q"] | None = None,
        tail: Bool[Tensor, "b q"] | None = None,
        groups: KeyGroups | None = None,
        lse: Float[Tensor, "b h q"] | None = None,
        unit: float = 1.0,
    ) -> None:
        self.want, self.into, self.groups, self.unit = want, into, groups, unit
        self._sinks, self._lse, self._tail = call.learned_sinks, lse, tail
        self._queries, self._offset = call.query.shape[2], call.key.shape[2] - call.query.shape[2]
        self._heads = call.query.shape[1]
        self._dtype = next(iter(into.values())).dtype if into else torch.float32
        self._live = None if live is None else live.expand(-1, self._heads, -1)
        self._weight = None if self._live is None else self._live.to(self._dtype)
        self._raw: dict[str, list[Tensor]] = defaultdict(list)
        self._heights: list[int] = []
        device = call.query.device
        # Descending from `keys`: of any block, `first row - key` is a slice of it.
        keys = call.key.shape[2]
        self._ruler = torch.arange(keys, -keys - self._queries, -1, device=device).to(self._dtype)

    def add(self, block: Block) -> None:
        """Take all statistics of a block; its rows come right before those of the block added before."""
        stats = self.want.stats
        self._heights.append(block.weights.shape[2])
        if block.peak is not None:
            self._raw["index"].append(block.peak.index + block.keys.start)
            self._raw["logit"].append(block.peak.logit)
            self._raw["top"].append(block.peak.weight)
        if block.factor is not None:
            self._raw["factor"].append(block.factor)
        weight = self._row_weights(block)
        if Stat.RECEIVED in stats and block.done is None:
            self._add_sum(Stat.RECEIVED, block, weight, block.weights)
        if self._tail is not None:
            tail = self._tail[:, None, block.rows]
            if bool(tail.any()):
                self._add_sum(Stat.RECEIVED_TAIL, block, torch.where(tail, weight, 0.0), block.weights)
        if Stat.DISTANCE in stats:
            done = None if block.done is None else block.done.mean_back
            self._raw["back"].append(self._mean_back(block) if done is None else done)
        if Stat.DISTANCE_WINDOWED in stats:
            self._raw["near"].append(self._nearness(block))
        if Stat.DIAGONAL in stats:
            self._diagonal(block)
        if Stat.GROUP_MASS in stats and self.groups is not None:
            self.into[Stat.GROUP_MASS][:, :, block.rows] = self.groups.mass(block.weights, block.keys)
        if stats & _FROM_PRODUCT:
            self._products(block, weight)
        if Stat.RECEIVED_SQUARED in stats:
            square = torch.mul(block.weights, block.weights, out=block.logits)
            self._add_sum(Stat.RECEIVED_SQUARED, block, weight.square(), square)
        if Stat.RECEIVED_MAX in stats:
            into = self.into[Stat.RECEIVED_MAX][:, :, block.keys]
            plain = block.factor is None and self._live is None
            found = block.weights if plain else torch.mul(block.weights, weight[..., None], out=block.logits)
            torch.maximum(into, found.amax(2), out=into)
        if Stat.GROUP_OUTPUT in stats and self.groups is not None:
            found = self.groups.output(block.weights, block.keys, block.logits)
            self.into[Stat.GROUP_OUTPUT][:, :, block.rows] = found

    @property
    def known(self) -> bool:
        """Whether the log-sum-exp was known, so that weights are `A` itself."""
        return self._lse is not None

    def pass_rows(
        self,
        logits: Float[Tensor, "b h r k"],
        rows: slice,
        keys: slice,
        half: Float[Tensor, "b h r k"] | None,
    ) -> native.RowResults:
        """The compiled row pass: logits become weights in place; received attention is added here and now."""
        stats, known = self.want.stats, self.known
        sinks = None
        if not known and self._sinks is not None:
            sinks = self._sinks.to(logits.dtype).expand(logits.shape[:2])
        request = native.RowRequest(
            known=known,
            peak=needs_peak(stats, known=known) or sinks is not None,
            product=Stat.ENTROPY in stats,
            back=self._back(rows, keys) if Stat.DISTANCE in stats else None,
            received=self.into[Stat.RECEIVED][:, :, keys] if Stat.RECEIVED in stats else None,
            count=None if self._weight is None else self._weight[:, :, rows],
            sinks=sinks,
            half=half,
        )
        return native.pass_rows(logits, request)

    def _row_weights(self, block: Block) -> Float[Tensor, "b h r"]:
        """`A / P` of the rows that count, 0 of the others."""
        if self._weight is None:
            return torch.ones_like(block.weights[..., 0]) if block.factor is None else block.factor
        weight = self._weight[:, :, block.rows]
        return weight if block.factor is None else weight * block.factor

    def _add_sum(self, stat: Stat, block: Block, weight: Tensor, matrix: Tensor, scale: float = 1.0) -> None:
        """Add `sum_r weight[r] matrix[r, k]`. A product with a vector is faster than a reduction."""
        b, h, r, k = matrix.shape
        out = workspace().take("row sums", (b * h, 1, k), matrix.dtype, matrix.device)
        torch.bmm(weight.reshape(b * h, 1, r), matrix.view(b * h, r, k), out=out)
        self.into[stat][:, :, block.keys].add_(out.view(b, h, k), alpha=scale)

    def _products(self, block: Block, weight: Tensor) -> None:
        """Entropy of rows and columns: both are sums of `P log P`."""
        if Stat.RECEIVED_LOG not in self.want.stats:
            done = None if block.done is None else block.done.product
            self._raw["product"].append(_row_products(block.weights, block.logits) if done is None else done)
            return
        if not self.known and block.peak is not None:
            block.logits.sub_(block.peak.norm[..., None])  # before the product: sums of it would cancel
        product = block.logits.mul_(block.weights)
        self._raw["product"].append(product.sum(-1))
        self._add_sum(Stat.RECEIVED_LOG, block, weight, product, self.unit)
        if block.factor is not None:
            log_factor = block.factor.clamp_min(_TINY).log()
            self._add_sum(Stat.RECEIVED_LOG, block, weight * log_factor, block.weights)

    def _diagonal(self, block: Block) -> None:
        """`P` at each row's own key; stays 0 where the block does not hold it."""
        r, k = block.weights.shape[2:]
        shift = block.rows.start + self._offset - block.keys.start
        if -r < shift < k:
            line = block.weights.diagonal(shift, 2, 3)
            first = block.rows.start + max(0, -shift)
            self.into[Stat.DIAGONAL][:, :, first : first + line.shape[-1]] = line

    def _back(self, rows: slice, keys: slice) -> Float[Tensor, " k"]:
        """The first row's position less each key's."""
        first = keys.start + self._queries - rows.start
        return self._ruler[first : first + keys.stop - keys.start]

    def _mean_back(self, block: Block) -> Float[Tensor, "b h r"]:
        """Weighted sum of (the block's first row less key): relative to the block, near keys stay exact."""
        back = self._back(block.rows, block.keys)
        return (block.weights.view(-1, back.shape[0]) @ back).view(block.weights.shape[:3])

    def _nearness(self, block: Block) -> Float[Tensor, "b h r"]:
        """`sum_k P relu(w - d)`, for `min(d, w) = w - relu(w - d)`: only keys nearer than the window matter."""
        window, device = self.want.window, block.weights.device
        place = torch.arange(block.rows.start, block.rows.stop, device=device)[:, None] + self._offset
        first = max(block.keys.start, block.rows.start + self._offset - window + 1)
        key = torch.arange(first, max(first, block.keys.stop), device=device)
        near = block.weights[..., first - block.keys.start :]
        return torch.einsum("bhrk,rk->bhr", near, (window - (place - key)).clamp_min(0).to(near.dtype))

    def finish(self) -> None:
        """Turn what was collected per row into statistics; all blocks are in."""
        raw = {name: torch.cat(parts[::-1], 2) for name, parts in self._raw.items()}
        factor = raw.get("factor")
        for stat, found in self._linear(raw).items():
            self.into[stat].copy_(found if factor is None else found * factor)
        for stat in {Stat.DIAGONAL, Stat.GROUP_MASS, Stat.GROUP_OUTPUT} & self.want.stats:
            if factor is not None:
                self.into[stat].mul_(factor[(..., *(None,) * (self.into[stat].ndim - 3))])
        for stat, found in self._logarithmic(raw).items():
            self.into[stat].copy_(found)
        if Stat.TOP1 in self.want.stats:
            votes = torch.ones_like(raw["top"]) if self._weight is None else self._weight
            self.into[Stat.TOP1].scatter_add_(-1, raw["index"], votes)
        if self._live is not None:
            for stat in self.want.stats - PER_KEY:
                dead = ~self._live[(..., *(None,) * (self.into[stat].ndim - 3))]
                self.into[stat].masked_fill_(dead, 0.0)

    def _linear(self, raw: dict[str, Tensor]) -> dict[Stat, Tensor]:
        """Per-row statistics that are sums over `P`."""
        stats, found = self.want.stats, {}
        mass = 1.0 if self._lse is None or self._sinks is None else 1.0 - self._sink_mass(self._lse)
        if Stat.ROW_MAX in stats:
            found[Stat.ROW_MAX] = raw["top"]
        if Stat.DISTANCE in stats:
            ahead = torch.cat([self._ruler.new_tensor(range(rows)) for rows in reversed(self._heights)])
            found[Stat.DISTANCE] = raw["back"] + ahead * mass
        if Stat.DISTANCE_WINDOWED in stats:
            found[Stat.DISTANCE_WINDOWED] = self.want.window * mass - raw["near"]
        return found

    def _logarithmic(self, raw: dict[str, Tensor]) -> dict[Stat, Tensor]:
        """Per-row statistics that need the log-sum-exp."""
        stats, found = self.want.stats & _FROM_NORM, {}
        norm = raw["logit"] - raw["top"].log() if self._lse is None and stats else self._lse
        if norm is None or not stats:
            return found
        lse = norm
        if self._lse is None and self._sinks is not None:
            lse = torch.logaddexp(norm, self._sinks[:, None].to(norm.dtype))
        if Stat.LSE in stats:
            found[Stat.LSE] = lse
        if Stat.LEARNED_SINK in stats:
            found[Stat.LEARNED_SINK] = torch.zeros_like(lse) if self._sinks is None else self._sink_mass(lse)
        if Stat.ENTROPY in stats:
            found[Stat.ENTROPY] = self._entropy(raw, norm)
        return found

    def _entropy(self, raw: dict[str, Tensor], norm: Tensor) -> Float[Tensor, "b h q"]:
        """`-sum A log A` from `sum P logits`; where `P` was `A`, the logits were `log A`."""
        entropy = raw["product"] * -self.unit
        if self._lse is None and Stat.RECEIVED_LOG not in self.want.stats:
            entropy += norm
        if "factor" in raw:
            entropy = (entropy - raw["factor"].clamp_min(_TINY).log()) * raw["factor"]
        return entropy

    def _sink_mass(self, lse: Tensor) -> Float[Tensor, "b h q"]:
        assert self._sinks is not None  # the callers have looked
        return torch.exp(self._sinks[:, None].to(lse.dtype) - lse)
