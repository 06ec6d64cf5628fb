"""Moving attention mass between sets of keys, beside the kernel that has made the output.

Every rule that rescales softmax weights by set of keys and by row changes the output of that row to

    o' = (o + sum_g (c_g - 1) o_g) / D

with `o_g = sum_{k in g} A[q, k] v_k`, a factor `c_g` per set and a common divisor `D`. It needs the columns of the sets
and the row's log-sum-exp, so it costs a few columns and not a map, at any context length.

Where `D` is small the output was mostly the sets', and what is left of it after subtracting them is rounding. Those
rows are computed again without the sets, a block of rows at a time (`_rest`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.errors import UsageError
from .blocked import attention_fused, attention_sweep
from .edit_notes import EditNotes
from .edits import MapEdit, edited, off_keys
from .gains import in_range, moved_by
from .key_sets import Columns, Factors, Gains, KeySets, Rule, Shares, checked_sizes, own_columns
from .shapes import Sizes, four_axes, sizes_of, visible_of
from .spec import AttentionCall, BlockPlan, Stat, Want

_DEFAULT_PLAN = BlockPlan()
_LARGEST_GAIN = 2.0
"""Largest `1 / D` by which the rounding of the kernel's own output may be multiplied."""
_LARGEST_GAIN_DOUBLE = 1000.0
_WORTH_PICKING = 16
"""From this many queries on, those that may be edited are picked out if they are half of all or fewer."""


@dataclass(frozen=True)
class Transferred:
    """Result of a transfer.

    Attributes:
        output: `[batch query head value_dim]` in the dtype of the kernel's output.
        rows: Rows whose weights changed.
        moved: Attention moved in these rows, half the sum of `|A' - A|` over keys and the learned sink (0 to 1),
            summed over rows; float64.
        again: Rows computed again without the sets.
        edit: What was done to the map, for whoever measures or edits it next; None if that was not asked for, or if
            the sets are empty.
    """

    output: Float[Tensor, "batch query head value_dim"]
    rows: Int[Tensor, ""]
    moved: Float[Tensor, ""]
    again: Int[Tensor, ""]
    edit: MapEdit | None = None


def row_lse(call: AttentionCall, plan: BlockPlan = _DEFAULT_PLAN) -> Float[Tensor, "batch head query"]:
    """Log-sum-exp of every row over its visible keys and the learned sink (nats), in float32 or float64.

    Rows without a visible key carry no meaning.
    """
    if call.query.dtype != torch.float64:
        want = Want(frozenset({Stat.LSE}))
        return attention_sweep(replace(call, counted=None), want, None, plan)[Stat.LSE]
    sizes = sizes_of(call, Want(frozenset()))
    parts = [torch.logsumexp(_logits(call, sizes, rows), -1) for rows in _row_blocks(sizes, sizes.keys, plan)]
    lse = torch.cat(parts, -1)
    if call.learned_sinks is None:
        return lse
    return torch.logaddexp(lse, call.learned_sinks.double()[:, None])


def transfer(
    call: AttentionCall,
    output: Float[Tensor, "batch query head value_dim"],
    sets: KeySets,
    rule: Rule,
    lse: Float[Tensor, "batch head query"] | None = None,
    *,
    rows: Bool[Tensor, "batch query"] | None = None,
    plan: BlockPlan = _DEFAULT_PLAN,
    remember: bool = False,
    logits: bool = False,
) -> Transferred:
    """Move attention between sets of keys.

    Args:
        call: The attention call. Its `edits` come before this one: masses are those they have left, and rows must
            still add up to 1.
        output: What a kernel, and those edits, made of it. Not changed.
        sets: Which keys, per query head or for all heads alike.
        rule: Factors from the masses of a block of rows.
        lse: Log-sum-exp of every row, learned sink included; None computes it in a sweep.
        rows: Rows that may be edited (real tokens); None means all. Rows that see nothing never are.
        plan: Size of the blocks.
        remember: Also return the edit itself.
        logits: The rule reads `Shares.logits`; every set must be one key. Everything is then done in float64.

    Raises:
        UsageError: The tensors do not fit together, or a gradient is expected.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (call.query, call.key, call.value, output)):
        raise UsageError(
            "Moving attention mass has no gradient, and a gradient is expected here.",
            hint="Run under torch.no_grad().",
        )
    with torch.no_grad(), torch.autocast(call.query.device.type, enabled=False):
        sizes = checked_sizes(call, output, sets, rows)
        lse = row_lse(call, plan) if lse is None else lse
        few = None if rows is None else _few(rows)
        if few is None:
            return _Transfer(call, sizes, sets, rule, lse, plan, remember, logits).run(output, rows)
        own = own_columns(sets, sizes, few.device)[few] if sets.keep_own else None
        part = replace(sets, own=own)
        small = rows_of_call(call, few)
        sizes = replace(sizes, queries=len(few), offset=sizes.keys - len(few))
        moving = _Transfer(small, sizes, part, rule, lse[:, :, few], plan, remember, logits)
        done = moving.run(output[:, few], None if rows is None else rows[:, few])
        whole = output.clone()
        whole[:, few] = done.output
        edit = None if done.edit is None else replace(done.edit, rows=few.expand(sizes.batch, -1), own=None)
        if edit is not None and sets.keep_own:
            edit = replace(edit, own=own_columns(sets, sizes_of(call, Want(frozenset())), few.device)[None])
        return replace(done, output=whole, edit=edit)


def _few(rows: Bool[Tensor, "batch query"]) -> Int[Tensor, " row"] | None:
    """The rows that may be edited in any batch row, if leaving out the others is worth it."""
    if rows.shape[1] < _WORTH_PICKING:
        return None
    found = rows.any(0).nonzero()[:, 0]
    return found if 0 < 2 * len(found) <= rows.shape[1] else None


def rows_of_call(call: AttentionCall, rows: Int[Tensor, " row"]) -> AttentionCall:
    """The attention of some rows to all keys, who sees whom as a mask."""
    batch, _, queries, _ = call.query.shape
    keys, device = call.key.shape[2], call.query.device
    if call.mask is not None:
        mask = four_axes(call.mask, queries, keys)[:, :, rows]
    elif call.causal:
        mask = (torch.arange(keys, device=device) <= rows[:, None] + (keys - queries))[None, None]
    else:
        mask = torch.ones(1, 1, len(rows), keys, dtype=torch.bool, device=device)
    index = rows.expand(batch, -1)
    edits = tuple(edit.of_rows(index) for edit in call.edits)
    query = call.query[:, :, rows]
    counted = None if call.counted is None else call.counted[:, rows]
    return replace(call, query=query, mask=mask, causal=False, counted=counted, edits=edits)


class _Transfer:
    """One transfer: what all blocks of rows share."""

    def __init__(
        self,
        call: AttentionCall,
        sizes: Sizes,
        sets: KeySets,
        rule: Rule,
        lse: Tensor,
        plan: BlockPlan,
        remember: bool,
        logits: bool,
    ) -> None:
        self.call, self.sizes, self.rule, self.plan, self.sets = call, sizes, rule, plan, sets
        self.kind = torch.float64 if logits else torch.promote_types(call.query.dtype, torch.float32)
        self.lse, self.tells_logits = lse.to(self.kind), logits
        self.line = Columns.of(sets, self.kind)
        self.columns, self.valid = self.line.index, self.line.valid
        self.shared = self.columns.shape[1] == 1
        self.key, self.value = (self._gathered(x) for x in (call.key, call.value))
        self.own = own_columns(sets, sizes, call.query.device) if sets.keep_own else None
        self.notes = (
            EditNotes.of(sets, sizes, self.own, self.kind) if remember and self.columns.shape[-1] else None
        )
        self.gain = _LARGEST_GAIN_DOUBLE if call.query.dtype == torch.float64 else _LARGEST_GAIN

    def run(self, output: Tensor, rows: Tensor | None) -> Transferred:
        device = output.device
        edited_rows, again = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        moved = torch.zeros((), dtype=torch.float64, device=device)
        result = output
        if self.columns.shape[-1]:
            result = torch.empty_like(output)
            for block in _row_blocks(self.sizes, self.columns.shape[-1] + self.sizes.value_dim, self.plan):
                allowed = None if rows is None else rows[:, None, block]
                done = self._block(output[:, block].transpose(1, 2), block, allowed)
                result[:, block] = done.output.transpose(1, 2)
                edited_rows += done.rows
                again += done.again
                moved += done.moved
        return Transferred(result, edited_rows, moved, again, self.notes and self.notes.edit)

    def _block(self, output: Float[Tensor, "b h r d"], rows: slice, allowed: Tensor | None) -> Transferred:
        weights, logits, logs = self._weights(rows)
        shares = self._shares(weights, rows)
        if self.tells_logits:
            shares = replace(shares, logits=logits)
        found = self._found(shares, logs)
        touched = self._touched(found, shares, allowed)
        weak = touched & (found.divisor * self.gain < found.kept)
        edited = touched & found.edited & ~weak
        wide = output.to(self.kind)
        changed = self._changed(found, wide, weights)
        # Rows that are not edited keep every bit, which a round trip through float32 keeps too.
        changed = torch.where(edited[..., None], changed, wide)
        moved = torch.where(edited, moved_by(shares, found), 0.0).sum(dtype=torch.float64)
        count = edited.sum()
        if self.notes is not None:
            self.notes.keep(rows, shares, found, edited)
        if bool(weak.any()):
            more, moved_more = self._again(changed, weights, logs, shares, weak, rows)
            count, moved = count + more, moved + moved_more
        return Transferred(changed.to(output.dtype), count, moved, weak.sum())

    def _found(self, shares: Shares, logs: Tensor) -> Factors:
        """What the rule says of some rows, as factors."""
        found = self.rule(shares)
        return in_range(found, logs, shares) if isinstance(found, Gains) else found

    def _changed(self, found: Factors, output: Tensor, weights: Tensor) -> Float[Tensor, "b h r d"]:
        """`(kept o + sum_g (c_g - kept) o_g) / D`."""
        if found.made is None:
            return (output + self._mixed(weights, found.factors - 1.0)) / found.divisor[..., None]
        kept = torch.as_tensor(found.kept)[..., None]
        return (kept * output + self._written(found.made - kept * weights)) / found.divisor[..., None]

    def _again(
        self,
        changed: Float[Tensor, "b h r d"],
        weights: Tensor,
        logs: Tensor,
        shares: Shares,
        weak: Tensor,
        rows: slice,
    ) -> tuple[Tensor, Tensor]:
        """Put rows computed without the sets in their place in `changed`; how many changed, and what they moved."""
        few = weak.flatten(0, 1).any(0).nonzero()[:, 0]
        weights, weak = weights[:, :, few], weak[:, :, few]
        rest, mixed = self._rest(few + rows.start)
        logits = None if shares.logits is None else shares.logits[:, :, few]
        shares = Shares(shares.mass[:, :, few], rest, shares.learned[:, :, few], logits)
        found = self._found(shares, logs[:, :, few])
        edited = weak & found.edited & self._touched(found, shares, None)
        if found.made is None:
            mended = (mixed + self._mixed(weights, found.factors)) / found.divisor[..., None]
        else:
            kept = torch.as_tensor(found.kept)[..., None]
            mended = (kept * mixed + self._written(found.made)) / found.divisor[..., None]
        changed[:, :, few] = torch.where(edited[..., None], mended, changed[:, :, few])
        if self.notes is not None:
            self.notes.keep(few + rows.start, shares, found, edited, among=weak)
        return edited.sum(), torch.where(edited, moved_by(shares, found), 0.0).sum(dtype=torch.float64)

    def _touched(self, found: Factors, shares: Shares, allowed: Tensor | None) -> Tensor:
        """Rows with mass in a set whose weights the factors change, if they may be edited at all."""
        if found.made is not None:
            return found.edited if allowed is None else found.edited & allowed
        changes = ((found.factors != 1.0) | (found.divisor != 1.0)[..., None]) & (shares.mass > 0)
        return changes.any(-1) if allowed is None else changes.any(-1) & allowed

    def _shares(self, weights: Tensor, rows: slice) -> Shares:
        mass = self.line.sums(weights)
        learned = torch.zeros_like(weights[..., 0])
        if self.call.learned_sinks is not None:
            sink = self.call.learned_sinks.to(self.kind)[:, None]
            learned = torch.exp(sink - self.lse[:, :, rows]).clamp(max=1.0)
        learned = off_keys(learned, self.call.edits, rows)
        return Shares(mass, (1.0 - learned - mass.sum(-1)).clamp(min=0.0), learned)

    def _weights(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """`A` at the columns of the sets, 0 where there is no column or the row does not see it; logits; ln `A`.

        Each is `[b h r column]`.
        """
        query = self.call.query[:, :, rows].to(self.kind).unflatten(1, (self.sizes.kv_heads, -1))
        logits = (query @ self.key.mT).flatten(1, 2) * self.call.scale
        if self.call.softcap is not None:
            logits = self.call.softcap * torch.tanh(logits / self.call.softcap)
        visible, bias = self._seen(rows)
        if bias is not None:
            logits = logits + bias
        if self.own is not None:
            visible = visible & (self.columns[:, :, None] != self.own[rows, None])
        logs = (logits - self.lse[:, :, rows, None]).clamp(max=0.0)
        weights = torch.exp(logs)
        for edit in self.call.edits:
            factor = edit.of_block(rows).at(self.columns)
            weights = weights * factor
            logs = logs + factor.log() if self.tells_logits else logs
        return torch.where(visible, weights, 0.0), logits, torch.where(visible, logs, float("-inf"))

    def _seen(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Which columns are there and visible, and what an additive mask adds to them."""
        there, columns = self.valid[:, :, None], self.columns[:, :, None]
        if self.call.mask is not None:
            mask = four_axes(self.call.mask, self.sizes.queries, self.sizes.keys)[:, :, rows]
            heads = max(mask.shape[1], columns.shape[1])
            full = (self.sizes.batch, heads, mask.shape[2])
            picked = mask.expand(*full, -1).gather(3, columns.expand(*full, -1))
            bias = None if picked.dtype == torch.bool else picked.to(self.kind)
            return visible_of(picked) & there, bias
        if not self.call.causal:
            return there, None
        place = torch.arange(self.sizes.queries, device=columns.device)[rows] + self.sizes.offset
        return there & (columns <= place[:, None]), None

    def _mixed(self, weights: Tensor, factors: Tensor) -> Float[Tensor, "b h r d"]:
        """`sum_g factors_g o_g`."""
        return self._written(weights * self.line.spread(factors))

    def _written(self, weights: Float[Tensor, "b h r column"]) -> Float[Tensor, "b h r d"]:
        """What weights on the columns write."""
        return (weights.unflatten(1, (self.sizes.kv_heads, -1)) @ self.value).flatten(1, 2)

    def _gathered(
        self, tensor: Float[Tensor, "b kv_head key d"]
    ) -> Float[Tensor, "b kv_head heads column d"]:
        """Keys or values of the columns; `heads` is 1 if all heads have the same sets, else the group's heads."""
        kv_heads, dim = tensor.shape[1], tensor.shape[3]
        n = self.columns.shape[-1]
        index = (
            self.columns.expand(-1, kv_heads, -1)
            if self.shared
            else self.columns.unflatten(1, (kv_heads, -1))
        )
        index = index.flatten(2)[..., None].expand(-1, -1, -1, dim)
        return tensor.gather(2, index).to(self.kind).unflatten(2, (1 if self.shared else self.sizes.group, n))

    def _rest(self, rows: Int[Tensor, " row"]) -> tuple[Float[Tensor, "b h row"], Float[Tensor, "b h row d"]]:
        """Mass of the keys outside of all sets, and what they write, summed over them and nothing else."""
        sizes, parts = self.sizes, []
        step = max(1, self.plan.scores // max(1, sizes.batch * sizes.heads * sizes.keys))
        for few in rows.split(step):
            call = self._without_sets(few)
            seen = visible_of(call.mask).any(-1)  # pyright: ignore[reportArgumentType]
            if self.kind == torch.float64 or call.edits:
                logits = _logits(call, sizes_of(call, Want(frozenset())), slice(0, len(few)))
                weights = torch.exp(logits.to(self.kind) - self.lse[:, :, few, None]).clamp(max=1.0)
                whole = slice(0, len(few)), slice(0, sizes.keys)
                weights, _ = edited(weights, weights[..., 0], call.edits, *whole)
                mixed = weights.unflatten(1, (sizes.kv_heads, -1)) @ call.value[:, :, None].to(self.kind)
                parts.append((weights.sum(-1), mixed.flatten(1, 2)))
                continue
            output, found = attention_fused(call, Want(frozenset({Stat.LSE})), self.plan)
            mass = torch.exp(found[Stat.LSE] - self.lse[:, :, few]).clamp(max=1.0)
            mass = torch.where(seen, mass, 0.0)
            parts.append((mass, output.transpose(1, 2).to(self.kind) * mass[..., None]))
        masses, outputs = zip(*parts, strict=True)
        return torch.cat(masses, 2), torch.cat(outputs, 2)

    def _without_sets(self, rows: Int[Tensor, " row"]) -> AttentionCall:
        """The attention of some rows to the keys outside of all sets."""
        sizes, device = self.sizes, self.columns.device
        inside = torch.zeros(*self.columns.shape[:2], sizes.keys, device=device)
        inside = (inside.scatter_add(2, self.columns, self.valid.float()) > 0)[:, :, None]
        key = torch.arange(sizes.keys, device=device)
        if self.own is not None:
            inside = inside & (key != self.own[rows, None])
        call = rows_of_call(self.call, rows)
        mask = call.mask
        assert mask is not None  # rows of a call always have one
        mask = mask & ~inside if mask.dtype == torch.bool else torch.where(inside, float("-inf"), mask)
        return replace(call, mask=mask, learned_sinks=None, counted=None)


def _row_blocks(sizes: Sizes, width: int, plan: BlockPlan) -> Iterator[slice]:
    """Ranges of rows with at most about `plan.scores` numbers of `width` per row and head in flight."""
    step = max(1, plan.scores // max(1, sizes.batch * sizes.heads * width))
    for start in range(0, sizes.queries, step):
        yield slice(start, min(start + step, sizes.queries))


def _logits(call: AttentionCall, sizes: Sizes, rows: slice) -> Float[Tensor, "b h r k"]:
    """Scaled, capped and masked logits of a few rows; hidden ones are -inf."""
    kind = torch.promote_types(call.query.dtype, torch.float32)
    query = call.query[:, :, rows].to(kind).unflatten(1, (sizes.kv_heads, -1))
    logits = (query @ call.key.to(kind)[:, :, None].mT).flatten(1, 2) * call.scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    if call.mask is not None:
        mask = four_axes(call.mask, sizes.queries, sizes.keys)[:, :, rows]
        if mask.dtype != torch.bool:
            logits = logits + mask.to(kind)
        return logits.masked_fill(~visible_of(mask), float("-inf"))
    if not call.causal:
        return logits
    place = torch.arange(sizes.queries, device=logits.device)[rows] + sizes.offset
    hidden = torch.arange(sizes.keys, device=logits.device) > place[:, None]
    return logits.masked_fill(hidden, float("-inf"))
