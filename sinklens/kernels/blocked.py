"""Exact attention statistics, a block of query rows at a time: memory grows with the keys, not their square.

Two entry points with the same definitions (`spec.Stat`, oracle in `reference.py`):

* `attention_fused` computes output and statistics in one pass; nothing is computed twice.
* `attention_sweep` computes statistics only, beside a kernel that has made the output. With that kernel's
  log-sum-exp it needs no pass for the softmax denominator.

Where the compiled kernels are there, calls without soft cap and additive mask go through one of them as a
whole (`rowpass.attend`), others block by block through its row pass, and the rest through torch. On CUDA the Triton
kernels take whole calls (`triton_pass.py`), where they can and have proved right.

Query heads that share a key head are rows of the same matrix product, so GQA repeats nothing. Keys that no
row of a block sees at either end (the future, what lies before a sliding window, padding) are not visited.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import UsageError
from . import triton_pass
from .asks import PER_KEY, asks_norm, asks_peak, reads_logits
from .block import Block, Peak, edited_block, row_peaks
from .groups import KeyGroups
from .powers import Powers
from .reduce import Accumulator
from .rowpass import attend_serves, native_serves
from .scores import Scores
from .shapes import sizes_of
from .spec import AttentionCall, AttentionStatistics, BlockPlan, Stat, Want
from .visibility import keys_seen, tail_rows, visibility
from .walk import Chunk, chunks, row_blocks
from .workspace import workspace

_DEFAULT_PLAN = BlockPlan()


def attention_fused(
    call: AttentionCall, want: Want, plan: BlockPlan = _DEFAULT_PLAN
) -> tuple[Float[Tensor, "batch query head value_dim"], AttentionStatistics]:
    """Attention output and statistics in one pass.

    Args:
        call: The attention call.
        want: The statistics; nothing else is computed.
        plan: Size of the blocks, type of the `q·k` product, whether to use the compiled row pass.

    Returns:
        The output in the query's dtype (0 in rows without a visible key), and the statistics in float32.

    Raises:
        UsageError: The tensors do not fit together, or a gradient is expected.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (call.query, call.key, call.value)):
        raise UsageError(
            "The fused attention pass has no gradient, and a gradient is expected here.",
            hint="Run under torch.no_grad(), or trace in faithful mode.",
        )
    with _quietly(call):
        return _Pass(call, want, plan).fused()


def attention_sweep(
    call: AttentionCall,
    want: Want,
    lse: Float[Tensor, "batch head query"] | None = None,
    plan: BlockPlan = _DEFAULT_PLAN,
) -> AttentionStatistics:
    """Statistics only, beside a kernel that computes the output.

    Args:
        call: The attention call.
        want: The statistics; nothing else is computed.
        lse: `Stat.LSE` of every row (nats): log-sum-exp over visible keys, *and* the learned sink if the call
            has one. Its values in rows without a visible key do not matter. None computes it. Not used where the map
            is edited.
        plan: As for `attention_fused`.

    Raises:
        UsageError: The tensors do not fit together.
    """
    with _quietly(call):
        return _Pass(call, want, plan).sweep(lse)


@contextmanager
def _quietly(call: AttentionCall) -> Iterator[None]:
    """No gradients, and no rounding by an autocast of the caller."""
    with torch.no_grad(), torch.autocast(call.query.device.type, enabled=False):
        yield


class _Pass:
    """One walk over the blocks of one call."""

    def __init__(self, call: AttentionCall, want: Want, plan: BlockPlan) -> None:
        self.call, self.want, self.plan = call, want, plan
        self.sizes = sizes_of(call, want)
        self.triton = plan.native and triton_pass.serves(call, want)
        if self.triton:
            return
        self.native = native_serves(call, plan)
        self.blocks = row_blocks(self.sizes, plan)
        self.chunks = list(chunks(self.sizes, plan, self.blocks[0][1]))
        self.view = visibility(call, self.sizes, self.blocks)
        self.result = torch.promote_types(call.query.dtype, torch.float32)
        self.values = {stat: self._zeros(stat) for stat in want.stats}
        self.live = self._live_rows()
        self.picked = self._picked_rows()
        wanted = Stat.ENTROPY_NORMALISED in want.stats
        self.keys_seen = keys_seen(call, self.sizes, self.blocks) if wanted else None

    def fused(self) -> tuple[Tensor, AttentionStatistics]:
        if self.triton:
            return triton_pass.fused(self.call, self.want)
        sizes = self.sizes
        shape = (sizes.batch, sizes.queries, sizes.heads, sizes.value_dim)
        output = torch.empty(shape, dtype=self.call.query.dtype, device=self.call.query.device)
        if not self._attended(output):
            for chunk in self.chunks:
                self._softmax(chunk, output[chunk.batch, :, chunk.heads].transpose(1, 2))
        return output, self._statistics()

    def sweep(self, lse: Tensor | None) -> AttentionStatistics:
        if self.triton:
            return triton_pass.sweep(self.call, self.want, lse)
        if self.want.stats and (lse is not None or not self._attended(None)):
            for chunk in self.chunks:
                if lse is None or self.call.edits:
                    self._softmax(chunk, None)
                else:
                    self._known(chunk, lse[chunk.batch, chunk.heads].to(self.result))
        return self._statistics()

    def _attended(self, output: Float[Tensor, "batch query head value_dim"] | None) -> bool:
        """The whole call in the compiled kernel; False where it cannot."""
        if not self.native or not attend_serves(self.call, self.plan):
            return False
        sizes = self.sizes
        everything = Chunk(slice(0, sizes.batch), slice(0, sizes.kv_heads), slice(0, sizes.heads))
        found = self._accumulator(everything, self.call)
        if found.reads_weights:
            return False
        found.attend(self.call, output, self.plan.scores)
        found.finish()
        return True

    def _softmax(self, chunk: Chunk, output: Float[Tensor, "b h q value_dim"] | None) -> None:
        """Weights normalised over the visible keys; learned sinks are a factor per row."""
        call = chunk.call(self.call)
        value = None if output is None else Values(call.value)
        found = self._accumulator(chunk, call)
        seen = None if self.view.seen is None else chunk.of(self.view.seen)
        for block, half in self._weighed(chunk, call, found, value):
            norm = block.lse
            if call.learned_sinks is not None and norm is not None:
                factor = torch.sigmoid(norm - call.learned_sinks[:, None].to(norm.dtype))
                block = replace(block, factor=factor)
            if call.edits:
                block = edited_block(block, call)
            if output is not None and value is not None:
                mixed, into = value.mix(block.weights, block.keys, half), output[:, :, block.rows]
                scale = block.scale
                if seen is not None:
                    scale = seen[:, :, block.rows] if scale is None else scale * seen[:, :, block.rows]
                if scale is None:
                    into.copy_(mixed)
                else:
                    torch.mul(mixed, scale[..., None], out=into)
            found.add(block)
        found.finish()

    def _weighed(
        self, chunk: Chunk, call: AttentionCall, found: Accumulator, value: Values | None
    ) -> Iterator[tuple[Block, Tensor | None]]:
        """Blocks of weights, of which compiled ones may be in half precision only."""
        if self.native:
            scores = Scores(call, self.plan)
            for rows, keys in self._walk():
                logits = scores.block(rows, keys)
                half = None if value is None else value.half_buffer(logits)
                yield (
                    self._passed(found, logits, rows, keys, half, keep=value is not None and half is None),
                    half,
                )
            return
        stats = self.want.stats
        powers = Powers(
            Scores(call, self.plan, base=2.0),
            None if self.view.seen is None else chunk.of(self.view.seen),
            apart=bool(call.edits) or reads_logits(stats),
            peaks=(asks_peak(stats) and not call.edits, Stat.ROW_MAX in stats),
            normed=bool(call.edits) or call.learned_sinks is not None or asks_norm(stats),
            normalised=value is not None and value.half,
        )
        for rows, keys in self._walk():
            yield powers.block(rows, keys), None

    def _known(self, chunk: Chunk, lse: Float[Tensor, "b h q"]) -> None:
        """Weights from a known log-sum-exp: they are `A` itself."""
        if self.view.seen is not None:
            # Kernels disagree on the log-sum-exp of a row that sees nothing: 0, -inf, inf, nan.
            lse = torch.where(chunk.of(self.view.seen), lse, 0.0)
        call = chunk.call(self.call)
        scores = Scores(call, self.plan, shift=lse, base=2.0)
        found = self._accumulator(chunk, call, lse)
        for rows, keys in self._walk():
            logits = scores.block(rows, keys)
            if self.native:
                found.add(self._passed(found, logits, rows, keys))
                continue
            # In place where nobody reads the logits afterwards: half as much has to stay in cache.
            weights = self._buffer(logits) if reads_logits(self.want.stats) else logits
            torch.exp2(logits, out=weights)
            shares = Stat.ROW_MAX in self.want.stats
            peak = row_peaks(weights, shares=shares) if asks_peak(self.want.stats) else None
            found.add(Block(rows, keys, weights, logits, peak, unit=math.log(2.0)))
        found.finish()

    def _passed(
        self,
        found: Accumulator,
        logits: Tensor,
        rows: slice,
        keys: slice,
        half: Tensor | None = None,
        *,
        keep: bool = False,
    ) -> Block:
        """A block that the compiled row pass has gone over."""
        done = found.pass_rows(logits, rows, keys, half, keep=keep)
        peak = Peak(*done.peak) if done.peak is not None else None
        # The second buffer is scratch of statistics that read the weights.
        buffer = self._buffer(logits) if found.reads_weights else logits
        return Block(rows, keys, logits, buffer, peak, done=done)

    def _walk(self) -> Iterator[tuple[slice, slice]]:
        """Blocks of rows, with the keys each of them needs.

        Last rows first: under a causal mask these need the most memory, and what they leave behind, here and in
        the allocators of the libraries below, serves all others. Growing blocks would fragment it.
        """
        for (start, end), (first, last) in reversed(list(zip(self.blocks, self.view.spans, strict=True))):
            yield slice(start, end), slice(first, last)

    def _buffer(self, logits: Tensor) -> Tensor:
        return workspace().take("weights", tuple(logits.shape), logits.dtype, logits.device)

    def _accumulator(self, chunk: Chunk, call: AttentionCall, lse: Tensor | None = None) -> Accumulator:
        return Accumulator(
            call,
            self.want,
            {stat: value[chunk.batch, chunk.heads] for stat, value in self.values.items()},
            live=None if self.live is None else chunk.of(self.live),
            picked={stat: rows[chunk.batch] for stat, rows in self.picked.items()},
            groups=self._groups(chunk, call),
            other=self._other(chunk),
            seen=None if self.keys_seen is None else chunk.of(self.keys_seen),
            lse=lse,
        )

    def _groups(self, chunk: Chunk, call: AttentionCall) -> KeyGroups | None:
        groups = self.want.groups
        if groups is None or not self.want.stats & {Stat.GROUP_MASS, Stat.GROUP_OUTPUT}:
            return None
        member = (groups if groups.ndim == 4 else groups[:, :, None]).permute(1, 2, 0, 3)
        value = call.value.to(self.result) if Stat.GROUP_OUTPUT in self.want.stats else None
        return KeyGroups(chunk.of(member), value)

    def _other(self, chunk: Chunk) -> Tensor | None:
        """Keys outside of the group that `RECEIVED_BAND_REST` leaves out."""
        groups = self.want.groups
        if groups is None or Stat.RECEIVED_BAND_REST not in self.want.stats:
            return None
        return chunk.of(~(groups[0] if groups.ndim == 4 else groups[0][:, None]))

    def _picked_rows(self) -> dict[Stat, Tensor]:
        """Rows of the sums that do not take all that count."""
        picked, want = {}, self.want
        if Stat.RECEIVED_TAIL in want.stats:
            picked[Stat.RECEIVED_TAIL] = tail_rows(self.view.rows, want.tail)
        if Stat.RECEIVED_ROWS in want.stats and want.probes is not None:
            picked[Stat.RECEIVED_ROWS] = self.view.rows & want.probes
        return picked

    def _zeros(self, stat: Stat) -> Tensor:
        sizes, groups = self.sizes, self.want.groups
        shape: tuple[int, ...] = (sizes.batch, sizes.heads, sizes.keys if stat in PER_KEY else sizes.queries)
        if stat in (Stat.GROUP_MASS, Stat.GROUP_OUTPUT) and groups is not None:
            shape += (groups.shape[0],)
        if stat is Stat.GROUP_OUTPUT:
            shape += (sizes.value_dim,)
        return torch.zeros(shape, dtype=self.result, device=self.call.query.device)

    def _live_rows(self) -> Tensor | None:
        """Rows that count, by head if the mask differs; None for all, which spares the bookkeeping."""
        rows, seen = self.view.rows[:, None], self.view.seen
        if seen is not None:
            return rows & seen
        return None if self.call.counted is None else rows

    def _statistics(self) -> AttentionStatistics:
        values = {stat: value.to(torch.float32) for stat, value in self.values.items()}
        return AttentionStatistics(values, self.view.counts, self.view.rows)


class Values:
    """The value operand as the output needs it: in a half-precision model in half precision, as its own kernel."""

    def __init__(self, value: Float[Tensor, "b kv_head key value_dim"]) -> None:
        self.half = value.dtype == torch.bfloat16 or (value.dtype == torch.float16 and value.is_cuda)
        self._dtype = value.dtype if self.half else torch.promote_types(value.dtype, torch.float32)
        self._value = value.to(self._dtype).contiguous()

    def half_buffer(self, logits: Tensor) -> Float[Tensor, "b h r k"] | None:
        """Room for the weights in bfloat16 if `mix` takes them so, for a pass that can fill it on its way."""
        if self._dtype != torch.bfloat16:
            return None
        return workspace().take("half weights", tuple(logits.shape), self._dtype, logits.device)

    def mix(
        self,
        weights: Float[Tensor, "b h r k"],
        keys: slice,
        half: Float[Tensor, "b h r k"] | None = None,
    ) -> Float[Tensor, "b h r value_dim"]:
        """`P v`; `half` are the weights as `half_buffer` wants them."""
        if half is not None:
            weights = half
        elif weights.dtype != self._dtype:
            half = workspace().take("half weights", tuple(weights.shape), self._dtype, weights.device)
            weights = half.copy_(weights)
        b, h, r, k = weights.shape
        value = self._value[:, :, keys].flatten(0, 1)
        return torch.bmm(weights.view(value.shape[0], -1, k), value).view(b, h, r, -1)
