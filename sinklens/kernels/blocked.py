"""Exact attention statistics, a block of query rows at a time: memory grows with the keys, not their square.

Two entry points with the same definitions (`spec.Stat`, oracle in `reference.py`):

* `attention_fused` computes output and statistics in one pass; nothing is computed twice.
* `attention_sweep` computes statistics only, beside a kernel that has made the output. With that kernel's
  log-sum-exp it needs no pass for the softmax denominator.

Query heads that share a key head are rows of the same matrix product, so GQA repeats nothing. Keys that no
row of a block sees at either end (the future, what lies before a sliding window, padding) are not visited.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import UsageError
from .reduce import Accumulator, Block, needs_norm, needs_peak, row_peaks
from .scores import Scores
from .shapes import Sizes, sizes_of
from .spec import AttentionCall, AttentionStatistics, BlockPlan, Want
from .visibility import Visibility, visibility
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
        plan: Size of the blocks and type of the `q·k` product.

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
            has one. Its values in rows without a visible key do not matter. None computes it.
        plan: Size of the blocks and type of the `q·k` product.

    Raises:
        UsageError: The tensors do not fit together.
    """
    return _Pass(call, want, plan).sweep(lse)


class _Pass:
    """One walk over the blocks of one call."""

    def __init__(self, call: AttentionCall, want: Want, plan: BlockPlan) -> None:
        self.sizes: Sizes = sizes_of(call, want)
        self.call, self.want, self.plan = call, want, plan
        self.blocks = row_blocks(self.sizes, plan)
        self.device = call.query.device

    def fused(self) -> tuple[Tensor, AttentionStatistics]:
        call, sizes = self.call, self.sizes
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            view = visibility(call, sizes, self.blocks)
            scores = Scores(call, sizes, self.plan)
            values = Values(call)
            shape = (sizes.batch, sizes.queries, sizes.heads, sizes.value_dim)
            output = torch.empty(shape, dtype=call.query.dtype, device=self.device)
            found = Accumulator(call, self.want, sizes, view, values.exact)
            for chunk, rows, keys in self._walk(view):
                into = output[chunk.batch, rows, chunk.heads].transpose(1, 2)
                if keys.start == keys.stop:
                    into.zero_()
                    continue
                block = self._softmax(scores, chunk, rows, keys, view)
                mixed = values.mix(block.weights, chunk, keys)
                into.copy_(mixed if block.factor is None else mixed * block.factor[..., None])
                found.add(block)
        return output, found.finish()

    def sweep(self, lse: Tensor | None) -> AttentionStatistics:
        call, sizes = self.call, self.sizes
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            view = visibility(call, sizes, self.blocks)
            if lse is not None:
                lse = _defined(lse.detach(), view)
            known = {"shifted": True, "base": 2.0} if lse is not None else {}
            scores = Scores(call, sizes, self.plan, **known)
            exact = Values(call).exact
            found = Accumulator(call, self.want, sizes, view, exact)
            for chunk, rows, keys in self._walk(view):
                if keys.start == keys.stop:
                    continue
                if lse is None:
                    found.add(self._softmax(scores, chunk, rows, keys, view))
                else:
                    found.add(self._known(scores, chunk, rows, keys, view, lse))
        return found.finish()

    def _walk(self, view: Visibility) -> Iterator[tuple[Chunk, slice, slice]]:
        """Chunks and blocks of rows, with the keys each block needs."""
        tallest = max(e - s for s, e in self.blocks)
        for chunk in chunks(self.sizes, self.plan, tallest):
            for (start, end), (first, last) in zip(self.blocks, view.spans, strict=True):
                yield chunk, slice(start, end), slice(first, last)

    def _softmax(self, scores: Scores, chunk: Chunk, rows: slice, keys: slice, view: Visibility) -> Block:
        """Weights normalised over the visible keys; learned sinks and unseen rows are in the factor."""
        stats, sinks = self.want.stats, self.call.learned_sinks
        logits = scores.block(chunk, rows, keys)
        weights = workspace().take("weights", tuple(logits.shape), logits.dtype, self.device)
        torch.softmax(logits, -1, out=weights)
        block = Block(chunk, rows, keys, weights, logits)
        if needs_peak(stats) or needs_norm(stats) or sinks is not None:
            block.peak = row_peaks(logits, weights)
            block.norm = block.lse = block.peak.logit - block.peak.weight.log()
        if sinks is not None and block.norm is not None:
            sink = sinks[chunk.heads, None].to(block.norm.dtype)
            block.factor = torch.sigmoid(block.norm - sink)
            block.sink = torch.sigmoid(sink - block.norm)
            block.lse = torch.logaddexp(block.norm, sink)
        seen = _of_block(view.seen, chunk, rows)
        if seen is not None:
            seen = seen.to(weights.dtype)
            block.factor = seen.expand(weights.shape[:3]) if block.factor is None else block.factor * seen
        return block

    def _known(
        self, scores: Scores, chunk: Chunk, rows: slice, keys: slice, view: Visibility, lse: Tensor
    ) -> Block:
        """Weights from a known log-sum-exp: they are `A` itself."""
        sinks = self.call.learned_sinks
        norm = lse[chunk.batch, chunk.heads, rows]
        logits = scores.block(chunk, rows, keys, norm)
        weights = workspace().take("weights", tuple(logits.shape), logits.dtype, self.device)
        # exp2 rather than exp, whose CPU kernel is several times slower where it underflows.
        torch.exp2(logits, out=weights)
        block = Block(chunk, rows, keys, weights, logits, lse=norm, unit=math.log(2.0))
        if needs_peak(self.want.stats):
            block.peak = row_peaks(logits, weights)
        if sinks is not None:
            block.sink = torch.exp(sinks[chunk.heads, None].to(norm.dtype) - norm)
            block.mass = 1.0 - block.sink
        seen = _of_block(view.seen, chunk, rows)
        if seen is not None:
            block.factor = seen.to(weights.dtype).expand(weights.shape[:3])
        return block


class Values:
    """The value operand: as the output needs it, and exact for `GROUP_OUTPUT`."""

    def __init__(self, call: AttentionCall) -> None:
        self._value = call.value
        half = call.value.dtype == torch.bfloat16 or (
            call.value.dtype == torch.float16 and call.value.is_cuda
        )
        self._dtype = call.value.dtype if half else torch.promote_types(call.value.dtype, torch.float32)
        self._mixed = _mergeable(call.value.to(self._dtype))

    @property
    def exact(self) -> Tensor:
        """In float32 or better."""
        return _mergeable(self._value.to(torch.promote_types(self._value.dtype, torch.float32)))

    def mix(self, weights: Tensor, chunk: Chunk, keys: slice) -> Float[Tensor, "b h r value_dim"]:
        """`P v`. In a half-precision model the product is made in half precision, as its own kernel does."""
        b, h, r, k = weights.shape
        value = self._mixed[chunk.batch, chunk.kv_heads, keys]
        if weights.dtype != self._dtype:
            half = workspace().take("half weights", tuple(weights.shape), self._dtype, weights.device)
            weights = half.copy_(weights)
        value = value.reshape(-1, k, value.shape[-1])
        return torch.bmm(weights.view(value.shape[0], -1, k), value).view(b, h, r, -1)


def _mergeable(tensor: Tensor) -> Tensor:
    """A layout in which the first two axes are one without a copy per block."""
    return tensor if tensor.shape[0] == 1 and tensor.stride(-1) == 1 else tensor.contiguous()


def _defined(lse: Tensor, view: Visibility) -> Tensor:
    """Kernels disagree on the log-sum-exp of a row that sees nothing (0, -inf, inf, nan): make it 0."""
    return lse if view.seen is None else torch.where(view.seen, lse, 0.0)


def _of_block(seen: Tensor | None, chunk: Chunk, rows: slice) -> Tensor | None:
    if seen is None:
        return None
    seen = seen[chunk.batch if seen.shape[0] > 1 else slice(None), :, rows]
    return seen[:, chunk.heads] if seen.shape[1] > 1 else seen
