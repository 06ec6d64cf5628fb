"""From blocks of attention weights to the statistics. One pass per statistic, and only for those asked for.

Every formula works on weights `P / inverse` with `A = factor * P`, so that the same code serves powers without their
denominator (`inverse` is one over it, `factor` carries learned sinks) and weights that are `A` already. Numbers per
row are collected raw and turned into statistics once, at the end: a block costs few calls besides its passes over
the weights.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from . import rowpass
from .asks import ENTROPIES, FROM_NORM, FROM_PRODUCT, PER_KEY, SCRATCHED, asks_norm, asks_peak
from .bands import add_band, nearness
from .block import Block, Peak, row_products
from .groups import KeyGroups
from .spec import AttentionCall, Stat, Want, part_left
from .visibility import reach
from .workspace import workspace

_BANDS = (Stat.RECEIVED_BAND, Stat.RECEIVED_BAND_REST)
# Sums over rows that the compiled pass makes, by its own names.
_NATIVE_SUMS = {
    Stat.RECEIVED: "received",
    Stat.RECEIVED_LOG: "received_log",
    Stat.RECEIVED_TAIL: "received_tail",
    Stat.RECEIVED_ROWS: "received_rows",
    Stat.RECEIVED_BAND: "band",
    Stat.RECEIVED_BAND_REST: "band_rest",
}
_TINY = 1e-38


class Accumulator:
    """Collects the statistics of a call (or a chunk of one) from its blocks of rows, last to first.

    Args:
        call: The call; of its rows, `live` count.
        want: The statistics.
        into: Where results go: zeros, shaped as `Stat` says.
        live: Rows that count, by head if that differs; None for all.
        picked: Rows of `RECEIVED_TAIL` and of `RECEIVED_ROWS`, where they are wanted.
        groups: Key sets of `GROUP_*`, None without.
        other: Keys outside of the group that `RECEIVED_BAND_REST` leaves out, None without.
        seen: Number of keys each row sees, for `ENTROPY_NORMALISED`.
        lse: Log-sum-exp with learned sinks (nats), if it was known: then `P` is `A`.
    """

    def __init__(
        self,
        call: AttentionCall,
        want: Want,
        into: dict[Stat, Tensor],
        *,
        live: Bool[Tensor, "b visible_head q"] | None = None,
        picked: dict[Stat, Bool[Tensor, "b q"]] | None = None,
        groups: KeyGroups | None = None,
        other: Bool[Tensor, "other_batch other_head key"] | None = None,
        seen: Int[Tensor, "seen_batch seen_head q"] | None = None,
        lse: Float[Tensor, "b h q"] | None = None,
    ) -> None:
        self.want, self.into, self.groups = want, into, groups
        self._sinks, self._lse, self._picked, self._seen = call.learned_sinks, lse, picked or {}, seen
        # No key is farther back than there are keys, and a lower cap loses less to cancellation.
        self._window = min(want.window, call.key.shape[2])
        self._queries, self._offset = call.query.shape[2], call.key.shape[2] - call.query.shape[2]
        self._batch, self._heads = call.query.shape[:2]
        self._dtype = next(iter(into.values())).dtype if into else torch.float32
        self._live = None if live is None else live.expand(-1, self._heads, -1)
        self._weight = None if self._live is None else self._live.to(self._dtype)
        self._other = None if other is None else other.to(self._dtype)
        self._columns = None
        if groups is not None and Stat.GROUP_MASS in want.stats:
            self._columns = groups.columns(self._heads)
        # First and last of the rows of each.
        self._reach = {stat: reach(rows.any(0)) for stat, rows in self._picked.items()}
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
            self._take_peak(block.peak, block.keys.start)
        for name, found in (("factor", block.factor), ("norm", block.norm), ("off", block.off)):
            if found is not None:
                self._raw[name].append(found)
        if block.done is None:
            self._add_torch(block)
        else:
            self._take(block.rows, block.done)
        if Stat.GROUP_MASS in stats and self.groups is not None and not self._done_mass(block):
            mass = self.groups.mass(block.weights, block.keys)
            self.into[Stat.GROUP_MASS][:, :, block.rows] = _times(mass, block.inverse)
        if not stats & SCRATCHED:
            return
        weight = self._row_weights(block)
        if Stat.RECEIVED_SQUARED in stats:
            square = torch.mul(block.weights, block.weights, out=block.logits)
            self._add_sum(Stat.RECEIVED_SQUARED, block, weight.square(), square)
        if Stat.RECEIVED_MAX in stats:
            into = self.into[Stat.RECEIVED_MAX][:, :, block.keys]
            plain = block.scale is None and self._live is None
            found = block.weights if plain else torch.mul(block.weights, weight[..., None], out=block.logits)
            torch.maximum(into, found.amax(2), out=into)
        if Stat.GROUP_OUTPUT in stats and self.groups is not None:
            found = self.groups.output(block.weights, block.keys, block.logits)
            self.into[Stat.GROUP_OUTPUT][:, :, block.rows] = _times(found, block.inverse)

    def _add_torch(self, block: Block) -> None:
        """What the compiled row pass would have found on its way."""
        stats, weight = self.want.stats, self._row_weights(block)
        if Stat.RECEIVED in stats:
            self._add_sum(Stat.RECEIVED, block, weight, block.weights)
        for stat, rows in self._picked.items():
            first, last = self._reach[stat]
            if first < block.rows.stop and block.rows.start <= last:
                some = torch.where(rows[:, None, block.rows], weight, 0.0)
                self._add_sum(stat, block, some, block.weights)
        for stat in stats.intersection(_BANDS):
            scale = weight if stat is Stat.RECEIVED_BAND else self._over_rest(block, weight)
            where = (block.rows, block.keys, self._offset, self.want.band)
            add_band(self.into[stat], block.weights, scale, *where)
        if Stat.DISTANCE in stats:
            self._raw["back"].append(_times(self._mean_back(block), block.inverse))
        if Stat.DISTANCE_WINDOWED in stats:
            where = (block.rows, block.keys, self._offset, self._window)
            self._raw["near"].append(_times(nearness(block.weights, *where), block.inverse))
        if Stat.DIAGONAL in stats:
            self._diagonal(block)
        if stats & FROM_PRODUCT:  # the last, for it overwrites the logits
            self._products(block, weight)

    def _take(self, rows: slice, done: rowpass.RowResults) -> None:
        """What the compiled row pass has found per row."""
        for name, found in (("back", done.mean_back), ("near", done.near), ("product", done.product)):
            if found is not None:
                self._raw[name].append(found)
        if done.own is not None:
            self.into[Stat.DIAGONAL][:, :, rows] = done.own
        if done.mass is not None and self.groups is not None:
            self.into[Stat.GROUP_MASS][:, :, rows] = self.groups.folded(done.mass)

    def _take_peak(self, peak: Peak, first: int) -> None:
        self._raw["index"].append(peak.index + first)
        if peak.weight is not None:
            self._raw["top"].append(peak.weight)
        if peak.logit is not None:
            self._raw["logit"].append(peak.logit)

    def _done_mass(self, block: Block) -> bool:
        return block.done is not None and block.done.mass is not None

    @property
    def reads_weights(self) -> bool:
        """Whether `add` needs the weights of a block that the compiled row pass has gone over."""
        asked = self.want.stats & SCRATCHED
        return bool(asked) or (Stat.GROUP_MASS in self.want.stats and self._columns is None)

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
        *,
        keep: bool,
    ) -> rowpass.RowResults:
        """The compiled row pass: what it can find is added here and now; logits become weights if to `keep`."""
        request = self._request(rows, keys, keep=keep or self.reads_weights, half=half)
        # The block's own sums first: weights that are added to a sum of thousands lose their digits one by one.
        shape, device = (len(request.sums), *logits.shape[:2], logits.shape[3]), logits.device
        own = workspace().take("block sums", shape, self._dtype, device).zero_()
        found = rowpass.pass_rows(logits, replace(request, sums=dict(zip(request.sums, own, strict=True))))
        for into, part in zip(request.sums.values(), own, strict=True):
            into.add_(part)
        return found

    def attend(
        self, call: AttentionCall, output: Float[Tensor, "b q h value_dim"] | None, scores: int
    ) -> None:
        """All rows and keys at once, with the output if it is wanted; instead of any `add`."""
        rows, keys = slice(0, self._queries), slice(0, call.key.shape[2])
        done = rowpass.attend(call, self._request(rows, keys), output, scores)
        self._take(rows, done)
        if done.peak is not None:
            peak = Peak(*done.peak)
            self._take_peak(peak, 0)
            if self._sinks is not None and peak.norm is not None:
                self._raw["factor"].append(torch.sigmoid(peak.norm - self._sinks[:, None].to(self._dtype)))

    def _request(
        self, rows: slice, keys: slice, *, keep: bool = False, half: Tensor | None = None
    ) -> rowpass.RowRequest:
        stats, known = self.want.stats, self.known
        sinks = sink_mass = None
        if self._sinks is not None and not known:
            sinks = self._sinks.to(self._dtype).expand(self._batch, self._heads)
        elif self._sinks is not None and self._lse is not None and self._other is not None:
            sink_mass = self._sink_mass(self._lse[:, :, rows])
        picked = {stat: mask[:, rows] for stat, mask in self._picked.items()}
        return rowpass.RowRequest(
            known=known,
            keep=keep,
            place=rows.start + self._offset - keys.start,
            peak=asks_peak(stats) or (not known and asks_norm(stats)) or sinks is not None,
            product=bool(stats & ENTROPIES),
            own=Stat.DIAGONAL in stats,
            window=self._window if Stat.DISTANCE_WINDOWED in stats else None,
            back=self._back(rows, keys) if Stat.DISTANCE in stats else None,
            columns=None if self._columns is None else self._columns - keys.start,
            sums={name: self.into[stat][:, :, keys] for stat, name in _NATIVE_SUMS.items() if stat in stats},
            tail=picked.get(Stat.RECEIVED_TAIL),
            probe=picked.get(Stat.RECEIVED_ROWS),
            band=self.want.band,
            other=self._other_rows((self._batch, self._heads), keys),
            sink_mass=sink_mass,
            count=None if self._weight is None else self._weight[:, :, rows],
            sinks=sinks,
            half=half,
        )

    def _other_rows(self, shape: tuple[int, ...], keys: slice) -> Float[Tensor, "heads k"] | None:
        """Keys outside of the first group, one row for all heads where they agree."""
        if self._other is None:
            return None
        if self._other.shape[0] == 1 and self._other.shape[1] == 1:
            return self._other[0, :, keys]
        return self._other[..., keys].expand(*shape, -1).reshape(-1, keys.stop - keys.start)

    def _over_rest(self, block: Block, weight: Float[Tensor, "b h r"]) -> Float[Tensor, "b h r"]:
        """`weight * part / (1 - mass of the first group)`, 0 where the group has nearly everything (`part_left`).

        What is left is added up, the share of a learned sink included: a difference would cancel where the group
        has nearly everything.
        """
        assert self._other is not None  # only asked for with groups
        left = _times((block.weights @ self._other[..., block.keys, None])[..., 0], block.inverse)
        norm = block.lse
        if block.off is not None and block.factor is not None:
            left = left * block.factor + block.off
        elif block.factor is not None and norm is not None and self._sinks is not None:
            share = torch.sigmoid(self._sinks[:, None].to(self._dtype) - norm)
            left = left * block.factor + share
        elif self._lse is not None and self._sinks is not None:
            left = left + self._sink_mass(self._lse[:, :, block.rows])
        part = part_left(left)
        return torch.where(part <= 0, 0.0, weight * part / left)

    def _row_weights(self, block: Block) -> Float[Tensor, "b h r"]:
        """`A / weights` of the rows that count, 0 of the others."""
        scale = block.scale
        if self._weight is None:
            return torch.ones_like(block.weights[..., 0]) if scale is None else scale
        weight = self._weight[:, :, block.rows]
        return weight if scale is None else weight * scale

    def _add_sum(self, stat: Stat, block: Block, weight: Tensor, matrix: Tensor, scale: float = 1.0) -> None:
        """Add `sum_r weight[r] matrix[r, k]`. A product with a vector is faster than a reduction."""
        b, h, r, k = matrix.shape
        out = workspace().take("row sums", (b * h, 1, k), matrix.dtype, matrix.device)
        torch.bmm(weight.reshape(b * h, 1, r), matrix.view(b * h, r, k), out=out)
        self.into[stat][:, :, block.keys].add_(out.view(b, h, k), alpha=scale)

    def _products(self, block: Block, weight: Tensor) -> None:
        """Entropy of rows and columns: both are sums of `P log P`."""
        if Stat.RECEIVED_LOG not in self.want.stats:
            product = row_products(block.weights, block.logits) * block.unit
            if block.inverse is not None:
                product = product * block.inverse + block.inverse.log()
            self._raw["product"].append(product)
            return
        if block.inverse is not None:  # before the product: sums of it would cancel
            block.logits.add_((block.inverse.log() / block.unit)[..., None])
        product = block.logits.mul_(block.weights)
        self._raw["product"].append(_times(product.sum(-1) * block.unit, block.inverse))
        self._add_sum(Stat.RECEIVED_LOG, block, weight, product, block.unit)
        if block.factor is not None:
            log_factor = block.factor.clamp_min(_TINY).log()
            self._add_sum(Stat.RECEIVED_LOG, block, weight * log_factor, block.weights)

    def _diagonal(self, block: Block) -> None:
        """`P` at each row's own key; stays 0 where the block does not hold it."""
        r, k = block.weights.shape[2:]
        shift = block.rows.start + self._offset - block.keys.start
        if -r < shift < k:
            line, skipped = block.weights.diagonal(shift, 2, 3), max(0, -shift)
            here = slice(skipped, skipped + line.shape[-1])
            first = block.rows.start + skipped
            into = self.into[Stat.DIAGONAL][:, :, first : first + line.shape[-1]]
            if block.inverse is None:
                into.copy_(line)
            else:
                torch.mul(line, block.inverse[:, :, here], out=into)

    def _back(self, rows: slice, keys: slice) -> Float[Tensor, " k"]:
        """The first row's position less each key's."""
        first = keys.start + self._queries - rows.start
        return self._ruler[first : first + keys.stop - keys.start]

    def _mean_back(self, block: Block) -> Float[Tensor, "b h r"]:
        """Weighted sum of (the block's first row less key): relative to the block, near keys stay exact."""
        back = self._back(block.rows, block.keys)
        return (block.weights.view(-1, back.shape[0]) @ back).view(block.weights.shape[:3])

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
            votes = self._weight
            if votes is None:
                votes = torch.ones_like(raw["index"], dtype=self._dtype)
            self.into[Stat.TOP1].scatter_add_(-1, raw["index"], votes)
        if Stat.RECEIVED_BAND_REST in self.want.stats and self._other is not None:
            self.into[Stat.RECEIVED_BAND_REST].mul_(self._other)
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
            found[Stat.DISTANCE] = raw["back"]
            if self._heights:  # of blocks, whose rows all looked back from their first
                ahead = [self._ruler.new_tensor(range(rows)) for rows in reversed(self._heights)]
                found[Stat.DISTANCE] = raw["back"] + torch.cat(ahead) * mass
        if Stat.DISTANCE_WINDOWED in stats:
            found[Stat.DISTANCE_WINDOWED] = self._window * mass - raw["near"]
        return found

    def _logarithmic(self, raw: dict[str, Tensor]) -> dict[Stat, Tensor]:
        """Per-row statistics that need the log-sum-exp."""
        stats, found = self.want.stats & FROM_NORM, {}
        norm = raw.get("norm", self._lse)
        if norm is None and stats:
            norm = raw["logit"] - raw["top"].log()
        if norm is None or not stats:
            return found
        lse = norm
        if self._lse is None and self._sinks is not None:
            lse = torch.logaddexp(norm, self._sinks[:, None].to(norm.dtype))
        if Stat.LSE in stats:
            found[Stat.LSE] = lse
        if Stat.LEARNED_SINK in stats:
            found[Stat.LEARNED_SINK] = torch.zeros_like(lse) if self._sinks is None else self._sink_mass(lse)
            found[Stat.LEARNED_SINK] = raw.get("off", found[Stat.LEARNED_SINK])
        if stats & ENTROPIES:
            found |= self._entropies(raw)
        return found

    def _entropies(self, raw: dict[str, Tensor]) -> dict[Stat, Tensor]:
        """`-sum A log A` from `sum P log P`, and its share of the most that the row's keys allow."""
        entropy = -raw["product"]
        if "factor" in raw:
            entropy = (entropy - raw["factor"].clamp_min(_TINY).log()) * raw["factor"]
        found = {Stat.ENTROPY: entropy} if Stat.ENTROPY in self.want.stats else {}
        if self._seen is not None:
            share = entropy / self._seen.clamp(min=2).to(entropy.dtype).log()
            found[Stat.ENTROPY_NORMALISED] = torch.where(self._seen > 1, share, 0.0)
        return found

    def _sink_mass(self, lse: Tensor) -> Float[Tensor, "b h q"]:
        assert self._sinks is not None  # the callers have looked
        return torch.exp(self._sinks[:, None].to(lse.dtype) - lse)


def _times(
    numbers: Float[Tensor, "b h r *rest"], scale: Float[Tensor, "b h r"] | None
) -> Float[Tensor, "b h r *rest"]:
    """A factor for each row; None for 1."""
    return numbers if scale is None else numbers * scale[(..., *(None,) * (numbers.ndim - 3))]
