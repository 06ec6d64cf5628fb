"""A block of attention weights, and what the torch path takes from its rows."""

from __future__ import annotations

from dataclasses import dataclass

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
        done: What the compiled row pass has found already; its sums over rows are then added too, and `weights`
            are only there if `Accumulator.reads_weights`.
        norm, off: Of edited weights, which are the softmax of no logits of a kernel: log-sum-exp before the edits
            (learned sinks left out), and mass on no key after them.
    """

    rows: slice
    keys: slice
    weights: Float[Tensor, "b h r k"]
    logits: Float[Tensor, "b h r k"]
    peak: Peak | None
    factor: Float[Tensor, "b h r"] | None = None
    done: rowpass.RowResults | None = None
    norm: Float[Tensor, "b h r"] | None = None
    off: Float[Tensor, "b h r"] | None = None


def edited_block(block: Block, peak: Peak, call: AttentionCall) -> Block:
    """The block after the call's edits: again weights that add up to 1 and their logarithms, the mass as factor.

    Args:
        peak: Of the block.
    """
    weights, learned = block.weights, torch.zeros_like(peak.logit)
    if block.factor is not None and call.learned_sinks is not None:
        weights = weights * block.factor[..., None]
        learned = torch.sigmoid(call.learned_sinks[:, None].to(learned.dtype) - peak.norm)
    weights, off = edited(weights, learned, call.edits, block.rows, block.keys)
    total = weights.sum(-1)
    shares = torch.where((total <= 0)[..., None], 1.0 / weights.shape[3], weights / total[..., None])
    logits = torch.where(shares > 0, shares.log(), HIDDEN)
    after = row_peaks(logits, shares)
    return Block(block.rows, block.keys, shares, logits, after, total, norm=peak.norm, off=off)


def row_peaks(logits: Float[Tensor, "b h r k"], weights: Float[Tensor, "b h r k"]) -> Peak:
    """Largest logit of each row, the first on ties, and the weight there."""
    return peak_at(*row_tops(logits), weights)


def peak_at(
    index: Int[Tensor, "b h r"], logit: Float[Tensor, "b h r"], weights: Float[Tensor, "b h r k"]
) -> Peak:
    """The peak from what `row_tops` found, once the weights are there."""
    return Peak(index, logit, _pick(weights, index))


def row_tops(logits: Float[Tensor, "b h r k"]) -> tuple[Int[Tensor, "b h r"], Float[Tensor, "b h r"]]:
    """Place and value of the largest logit of each row, the first on ties.

    On CPU torch's maximum is vectorised and its arg-max is not, so the place is searched among the maxima of short
    pieces of the row, and then among the keys of the winner.
    """
    keys = logits.shape[3]
    if logits.device.type != "cpu" or keys < 4 * _PIECES[-1]:
        logit, index = logits.max(-1)
        return index, logit
    size = next((size for size in _PIECES if keys % size == 0), _PIECES[-1])
    rest = keys % size
    tops = logits[..., : keys - rest].unflatten(-1, (-1, size)).amax(-1)
    if rest:
        tops = torch.cat([tops, logits[..., keys - rest :].amax(-1, keepdim=True)], -1)
    piece = _argmax(tops)
    if rest:
        # The last piece is short: its last key is then looked at repeatedly, which changes no arg-max.
        columns = piece[..., None] * size + torch.arange(size, device=logits.device)
        inner = _argmax(logits.gather(-1, columns.clamp_(max=keys - 1)))
    else:
        each = torch.arange(piece.numel(), device=logits.device) * tops.shape[-1]
        inner = _argmax(logits.view(-1, size).index_select(0, each.add_(piece.flatten()))).view_as(piece)
    return piece * size + inner, _pick(tops, piece)


def _argmax(table: Float[Tensor, "... k"]) -> Int[Tensor, "..."]:
    """Place of the largest entry of each row of a small CPU tensor, the first on ties.

    numpy's is vectorised, but on one thread: over a whole block it would pull into one core's cache what the others
    are about to write, which costs more than the search where cores do not share a cache.
    """
    return torch.from_numpy(table.numpy().argmax(-1))


def _pick(table: Tensor, index: Tensor) -> Tensor:
    return table.gather(-1, index[..., None])[..., 0]


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
