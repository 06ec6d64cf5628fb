"""Blocks of attention logits: scaled, capped, masked, in float32 whatever the model's precision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from .shapes import Sizes, four_axes, visible_of
from .spec import AttentionCall, BlockPlan
from .walk import Chunk
from .workspace import workspace

# Hidden logits are this instead of -inf: exp gives 0 all the same, and 0 * logit stays 0 instead of NaN.
HIDDEN = -1e30


class Scores:
    """Logits of a call, block by block, in a buffer that the next block overwrites.

    Args:
        call, sizes, plan: The call and how it is walked.
        shifted: Blocks will be asked for with a `shift`.
        base: The logits are logarithms to this base; 2 where `exp2` follows.
    """

    def __init__(self, call: AttentionCall, sizes: Sizes, plan: BlockPlan, *, shifted: bool = False, base: float = math.e) -> None:
        self.call, self.sizes = call, sizes
        self.device = call.query.device
        self.result = torch.promote_types(call.query.dtype, torch.float32)
        self._product = plan.score_dtype if plan.score_dtype.itemsize < 4 else self.result
        self._exact_half = _exact_half(call, plan)
        self._unit = 1.0 / math.log(base)
        linear = call.softcap is None
        factor = call.scale * (self._unit if linear else 1.0)
        # The factor goes into the query, where it costs no pass over the logits, unless that would round them.
        rounds = self._exact_half or self._product.itemsize < 4
        before = not rounds or abs(math.frexp(factor)[0]) == 0.5
        self._before, self._after = (factor, 1.0) if before else (1.0, factor)
        # log-sum-exp as one more column of the product: [q, -lse]·[k, 1].
        self._column = shifted and linear and not rounds
        self._key = self._keys()
        self._mask = None if call.mask is None else four_axes(call.mask, sizes.queries, sizes.keys)

    def _keys(self) -> Tensor:
        key, sizes = self.call.key, self.sizes
        if not self._column:
            key = key.to(self._product)
            return key if sizes.batch == 1 and key.stride(-1) == 1 else key.contiguous()
        shape = (sizes.batch, sizes.kv_heads, sizes.keys, sizes.dim + 1)
        wide = torch.empty(shape, dtype=self._product, device=self.device)
        wide[..., : sizes.dim].copy_(key)
        wide[..., sizes.dim :] = 1.0
        return wide

    def block(
        self, chunk: Chunk, rows: slice, keys: slice, shift: Float[Tensor, "b h r"] | None = None
    ) -> Float[Tensor, "b h r k"]:
        """Logits of a block, less `shift` per row; hidden keys are `HIDDEN`."""
        key = self._key[chunk.batch, chunk.kv_heads, keys]
        query = self._query(chunk, rows, shift)
        b, h, r, width = query.shape
        key = key.reshape(-1, key.shape[2], width)
        logits = self._multiply(query.view(key.shape[0], -1, width), key).view(b, h, r, -1)
        late = None if shift is None or self._column else (shift * -self._unit)[..., None]
        if self.call.softcap is not None:
            logits.mul_(self._after / self.call.softcap).tanh_().mul_(self.call.softcap * self._unit)
            if late is not None:
                logits.add_(late)
        elif late is not None:
            torch.add(late, logits, alpha=self._after, out=logits)
        elif self._after != 1.0:
            logits.mul_(self._after)
        if self._mask is not None:
            self._add_mask(logits, chunk, rows, keys)
        elif self.call.causal:
            self._hide_future(logits, rows, keys)
        return logits

    def _query(self, chunk: Chunk, rows: slice, shift: Tensor | None) -> Float[Tensor, "b h r width"]:
        query, dim = self.call.query[chunk.batch, chunk.heads, rows], self.sizes.dim
        shape = (*query.shape[:3], dim + self._column)
        buffer = workspace().take("query", shape, self._product, self.device)
        buffer[..., :dim].copy_(query)
        if self._before != 1.0:
            buffer[..., :dim].mul_(self._before)
        if self._column and shift is not None:
            torch.mul(shift, -self._unit, out=buffer[..., dim])
        return buffer

    def _multiply(self, query: Float[Tensor, "u r d"], key: Float[Tensor, "u k d"]) -> Float[Tensor, "u r k"]:
        shape = (query.shape[0], query.shape[1], key.shape[1])
        logits = workspace().take("logits", shape, self.result, self.device)
        if self._product.itemsize < 4:
            half = workspace().take("half logits", shape, self._product, self.device)
            return logits.copy_(torch.bmm(query, key.mT, out=half))
        if self._exact_half:
            with _bfloat16_products():
                return torch.bmm(query, key.mT, out=logits)
        return torch.bmm(query, key.mT, out=logits)

    def _hide_future(self, logits: Tensor, rows: slice, keys: slice) -> None:
        """Key `k` is hidden from row `q` if `k > q + offset`: a triangle at the end of the block."""
        place = rows.start + self.sizes.offset
        first = max(place, keys.start)
        count, height = keys.stop - first, rows.stop - rows.start
        if count <= 0:
            return
        triangle = torch.full((height, count), HIDDEN, dtype=logits.dtype, device=self.device)
        logits[..., first - keys.start :].add_(triangle.triu_(1 + place - first))

    def _add_mask(self, logits: Tensor, chunk: Chunk, rows: slice, keys: slice) -> None:
        assert self._mask is not None  # the caller has looked
        batch = chunk.batch if self._mask.shape[0] > 1 else slice(None)
        heads = chunk.heads if self._mask.shape[1] > 1 else slice(None)
        mask = self._mask[batch, heads, rows, keys]
        visible = visible_of(mask)
        bias = 0.0 if mask.dtype == torch.bool else mask.to(logits.dtype) * self._unit
        logits.add_(torch.where(visible, bias, HIDDEN))


def _exact_half(call: AttentionCall, plan: BlockPlan) -> bool:
    """Whether `q·k` of a bfloat16 model can be multiplied in bfloat16 hardware with float32 results."""
    return (
        call.query.dtype == call.key.dtype == torch.bfloat16
        and plan.score_dtype == torch.float32
        and call.query.device.type == "cpu"
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Let float32 products round their operands to bfloat16, for one product.

    The operands are bfloat16 numbers already, so nothing is rounded: the result is a float32 sum of exact
    products, made by hardware twice as fast. torch has no other way to ask for a float32 result on CPU.
    """
    matmul = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
