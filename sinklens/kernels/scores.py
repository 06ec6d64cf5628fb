"""Blocks of attention logits: scaled, capped, masked, in float32 whatever the model's precision."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from .block import HIDDEN
from .shapes import four_axes, visible_of
from .spec import AttentionCall, BlockPlan
from .workspace import workspace


class Scores:
    """Logits of a call, block by block, in a buffer that the next block overwrites.

    Args:
        call: The call, or a chunk of one.
        plan: Type of the `q·k` product.
        shift: Per row `[batch, head, query]`, in nats, taken off the logits.
        base: The logits are logarithms to this base; 2 where `exp2` follows.
    """

    def __init__(
        self, call: AttentionCall, plan: BlockPlan, *, shift: Tensor | None = None, base: float = math.e
    ) -> None:
        self.call, self.device, self._shift = call, call.query.device, shift
        self.result = torch.promote_types(call.query.dtype, torch.float32)
        self._product = plan.score_dtype if plan.score_dtype.itemsize < 4 else self.result
        self._exact_half = _exact_half(call, plan)
        self._unit = 1.0 / math.log(base)
        linear = call.softcap is None
        factor = call.scale * (self._unit if linear else 1.0)
        # The factor goes into the query, where it costs no pass over the logits, unless that would round
        # them.
        rounds = self._exact_half or self._product.itemsize < 4
        before = not rounds or abs(math.frexp(factor)[0]) == 0.5
        self._before, self._after = (factor, 1.0) if before else (1.0, factor)
        # The shift as one more column of the product: [q, -shift]·[k, 1].
        self._column = shift is not None and linear and not rounds
        self._key = self._keys()
        queries, keys = call.query.shape[2], call.key.shape[2]
        self._offset = keys - queries
        self._mask = None if call.mask is None else four_axes(call.mask, queries, keys)
        self._triangle: Tensor | None = None

    def _keys(self) -> Float[Tensor, "batch kv_head key width"]:
        key = self.call.key
        if not self._column:
            return key.to(self._product).contiguous()
        wide = torch.empty(*key.shape[:3], key.shape[3] + 1, dtype=self._product, device=self.device)
        wide[..., :-1].copy_(key)
        wide[..., -1:] = 1.0
        return wide

    def block(self, rows: slice, keys: slice) -> Float[Tensor, "b h r k"]:
        """Logits of some rows and keys; hidden ones are `HIDDEN`."""
        key = self._key[:, :, keys].flatten(0, 1)
        query = self._query(rows)
        b, h, r, width = query.shape
        logits = self._multiply(query.view(key.shape[0], -1, width), key).view(b, h, r, -1)
        late = None
        if self._shift is not None and not self._column:
            late = (self._shift[:, :, rows] * -self._unit)[..., None]
        if self.call.softcap is not None:
            logits.mul_(self._after / self.call.softcap).tanh_().mul_(self.call.softcap * self._unit)
            if late is not None:
                logits.add_(late)
        elif late is not None:
            torch.add(late, logits, alpha=self._after, out=logits)
        elif self._after != 1.0:
            logits.mul_(self._after)
        if self._mask is not None:
            self._add_mask(logits, self._mask[:, :, rows, keys])
        elif self.call.causal:
            self._hide_future(logits, rows, keys)
        return logits

    def _query(self, rows: slice) -> Float[Tensor, "b h r width"]:
        query = self.call.query[:, :, rows]
        b, h, r, dim = query.shape
        buffer = workspace().take("query", (b, h, r, dim + self._column), self._product, self.device)
        into = buffer[..., :dim] if self._column else buffer
        if query.dtype == self._product:
            torch.mul(query, self._before, out=into)
        else:  # converted first: the product of a half-precision number and a scalar would be rounded to half
            into.copy_(query).mul_(self._before)
        if self._column and self._shift is not None:
            torch.mul(self._shift[:, :, rows], -self._unit, out=buffer[..., dim])
        return buffer

    def _multiply(self, query: Float[Tensor, "u r d"], key: Float[Tensor, "u k d"]) -> Float[Tensor, "u r k"]:
        shape = (query.shape[0], query.shape[1], key.shape[1])
        logits = workspace().take("logits", shape, self.result, self.device)
        if self._product.itemsize < 4:
            half = workspace().take("half logits", shape, self._product, self.device)
            return logits.copy_(torch.bmm(query, key.mT, out=half))
        if self._exact_half:
            if not key.is_contiguous():  # else this kind of product silently takes the slow way
                key = workspace().take("keys", tuple(key.shape), key.dtype, key.device).copy_(key)
            with _bfloat16_products():
                return torch.bmm(query, key.mT, out=logits)
        return torch.bmm(query, key.mT, out=logits)

    def _hide_future(self, logits: Tensor, rows: slice, keys: slice) -> None:
        """Key `k` is hidden from row `q` if `k > q + offset`: a triangle at the end of the block."""
        place = rows.start + self._offset
        first = max(place, keys.start)
        count, height = keys.stop - first, rows.stop - rows.start
        if count <= 0:
            return
        # Rows before the first key see nothing, however far before; keys after the last row nobody sees.
        skipped, start = min(first - place, height), first - keys.start
        if count > height:
            logits[..., start + height :].add_(HIDDEN)
            count = height
        if self._triangle is None or self._triangle.shape[0] < height + skipped:
            square = (height + skipped, height + skipped)
            self._triangle = torch.full(square, HIDDEN, dtype=logits.dtype, device=self.device).triu_(1)
        logits[..., start : start + count].add_(self._triangle[:height, skipped : skipped + count])

    def _add_mask(self, logits: Tensor, mask: Tensor) -> None:
        bias = 0.0 if mask.dtype == torch.bool else mask.to(logits.dtype) * self._unit
        logits.add_(torch.where(visible_of(mask), bias, HIDDEN))


def _exact_half(call: AttentionCall, plan: BlockPlan) -> bool:
    """Whether `q·k` of a bfloat16 model can be multiplied in bfloat16 hardware with float32 results."""
    return (
        call.query.dtype == call.key.dtype == torch.bfloat16
        and plan.score_dtype == torch.float32
        and call.query.device.type == "cpu"
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and _alone()
    )


def _alone() -> bool:
    """Whether no other thread can be multiplying float32 numbers, as far as Python knows.

    The precision of products is one setting of the whole process: another thread's would be rounded. Threads that
    watch (progress bars, notebooks) are daemons and multiply nothing.
    """
    others = (each for each in threading.enumerate() if each is not threading.main_thread())
    return threading.current_thread() is threading.main_thread() and all(each.daemon for each in others)


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
