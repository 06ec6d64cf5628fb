"""A block of attention weights, and what the torch path takes from its rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import rowpass
from .edits import edited
from .spec import AttentionCall

HIDDEN = -1e30
"""Hidden logits are this instead of -inf: exp gives 0 all the same, and 0 * logit stays 0 instead of NaN."""
# Of these lengths the first that divides the row: more than a last short one costs nothing.
_PIECES = (128, 64)


@dataclass(frozen=True)
class Peak:
    """Largest entry of each row: its key, counted from the block's first, and where wanted its share and its logit."""

    index: Int[Tensor, "b h r"]
    weight: Float[Tensor, "b h r"] | None = None
    logit: Float[Tensor, "b h r"] | None = None

    @property
    def norm(self) -> Float[Tensor, "b h r"] | None:
        """Log-sum-exp (nats) of the row's logits, where both are there."""
        return None if self.logit is None or self.weight is None else self.logit - self.weight.log()


@dataclass(frozen=True)
class Block:
    """Some rows of some heads; keys outside of `keys` have weight 0.

    Attributes:
        weights: `P`, or multiples of it, `[b, h, r, k]`.
        logits: Logarithms of the weights, hidden keys very negative but finite. Overwritten. Only there if
            `reads_logits`.
        peak: If `asks_peak`; of compiled blocks also if their log-sum-exp is needed.
        inverse: `P / weights`, `[b, h, r]`; None if 1.
        factor: `A / P`, `[b, h, r]`; None if 1.
        unit: Nats per unit of the logits.
        done: What the compiled row pass has found already; its sums over rows are then added too, and `weights`
            are only there if `Accumulator.reads_weights`.
        norm: Log-sum-exp of the row's logits (nats), learned sinks left out, before any edit. None if `peak` tells it,
            if it was known, or if nothing needs it.
        off: Of edited weights, mass on no key after the edits.
    """

    rows: slice
    keys: slice
    weights: Float[Tensor, "b h r k"]
    logits: Float[Tensor, "b h r k"]
    peak: Peak | None
    inverse: Float[Tensor, "b h r"] | None = None
    factor: Float[Tensor, "b h r"] | None = None
    unit: float = 1.0
    done: rowpass.RowResults | None = None
    norm: Float[Tensor, "b h r"] | None = None
    off: Float[Tensor, "b h r"] | None = None

    @property
    def lse(self) -> Float[Tensor, "b h r"] | None:
        """`norm`, from wherever it is."""
        return self.peak.norm if self.norm is None and self.peak is not None else self.norm

    @property
    def scale(self) -> Float[Tensor, "b h r"] | None:
        """`A / weights`; None if 1."""
        if self.inverse is None or self.factor is None:
            return self.factor if self.inverse is None else self.inverse
        return self.inverse * self.factor


def edited_block(block: Block, call: AttentionCall) -> Block:
    """The block after the call's edits: again weights that add up to 1 and their logarithms, the mass as factor."""
    weights, norm, scale = block.weights, block.lse, block.scale
    assert norm is not None  # a softmax was taken
    weights = weights if scale is None else weights * scale[..., None]
    learned = torch.zeros_like(norm)
    if call.learned_sinks is not None:
        learned = torch.sigmoid(call.learned_sinks[:, None].to(learned.dtype) - norm)
    weights, off = edited(weights, learned, call.edits, block.rows, block.keys)
    total = weights.sum(-1)
    shares = torch.where((total <= 0)[..., None], 1.0 / weights.shape[3], weights / total[..., None])
    logits = torch.where(shares > 0, shares.log(), HIDDEN)
    peak = row_peaks(shares, shares=True)
    return Block(block.rows, block.keys, shares, logits, peak, factor=total, norm=norm, off=off)


def row_peaks(
    weights: Float[Tensor, "b h r k"], inverse: Float[Tensor, "b h r"] | None = None, *, shares: bool
) -> Peak:
    """The peaks of weights that are `inverse` times too large; with their shares if those are wanted."""
    index = row_argmax(weights)
    if not shares:
        return Peak(index)
    top = weights.gather(-1, index[..., None])[..., 0]
    return Peak(index, top if inverse is None else top * inverse)


def row_argmax(weights: Float[Tensor, "b h r k"]) -> Int[Tensor, "b h r"]:
    """Place of the largest weight of each row, the first on ties.

    On CPU torch's maximum is vectorised and its arg-max is not, so the place is searched among the maxima of short
    pieces of the row, and then among the keys of the winner. numpy's arg-max is vectorised, but on one thread: over a
    whole block it would pull into one core's cache what the others are about to read, which costs more than the search
    where cores do not share a cache. Of the few numbers of the search it is the fastest.
    """
    keys = weights.shape[3]
    if weights.device.type != "cpu" or keys < 4 * _PIECES[-1]:
        return weights.max(-1).indices
    size = next((size for size in _PIECES if keys % size == 0), _PIECES[-1])
    rest = keys % size
    tops = weights[..., : keys - rest].unflatten(-1, (-1, size)).amax(-1)
    if rest:
        tops = torch.cat([tops, weights[..., keys - rest :].amax(-1, keepdim=True)], -1)
    piece = tops.numpy().argmax(-1)
    if rest:
        # The last piece is short: its last key is then looked at repeatedly, which changes no arg-max.
        columns = np.minimum(piece[..., None] * size + np.arange(size), keys - 1)
        winner = weights.gather(-1, torch.from_numpy(columns))
    else:
        each = np.arange(0, tops.numel(), tops.shape[-1]) + piece.ravel()
        winner = weights.view(-1, size).index_select(0, torch.from_numpy(each)).view(*piece.shape, size)
    return torch.from_numpy(piece * size + winner.numpy().argmax(-1))


def row_products(
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
