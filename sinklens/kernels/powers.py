"""Attention weights without their denominators: a power of two for each logit, in place, and the sum of each row.

A softmax goes over a block of logits twice more, and with the natural exponential, whose CPU kernel is slow. The
denominator is one number per row, and all that is taken from the weights is linear in it.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .block import Block, row_peaks
from .scores import Scores
from .workspace import workspace

_NATS = math.log(2.0)
# Sums of a row within which squares of its weights and of their denominator are in range of float32, and nothing that
# counts is lost to underflow. The logits of most models stay far inside.
_LEAST, _MOST = 2.0**-40, 2.0**40


class Powers:
    """Blocks of weights `2^logit` of one call.

    Where the sums of a block show that its logits are too large or too small for that, the largest of each row is
    taken off first, from then on: a model with such logits has more of them.

    Args:
        scores: Logits to base 2.
        seen: Rows that see a key; None for all.
        apart: Whether the logits are read afterwards, or used as scratch. Else the weights take their place, and half
            as much has to stay in cache.
        peaks: Whether the largest weight of each row is wanted: its key, and also its share.
        normed: Whether the log-sum-exp is wanted.
        normalised: Whether weights have to add up to 1, at the cost of a pass over them.
    """

    def __init__(
        self,
        scores: Scores,
        seen: Bool[Tensor, "#batch #head query"] | None,
        *,
        apart: bool,
        peaks: tuple[bool, bool],
        normed: bool,
        normalised: bool,
    ) -> None:
        self._scores, self._seen = scores, seen
        self._apart, self._peaks, self._normed, self._normalised = apart, peaks, normed, normalised
        # To look at the sums would make an accelerator wait for every block.
        self._levelled = scores.device.type != "cpu"

    def block(self, rows: slice, keys: slice) -> Block:
        """The weights of a block, valid until the next one; of a row that sees nothing, any finite ones."""
        if not self._levelled:
            logits = self._scores.block(rows, keys)
            weights, total = self._raised(logits, rows)
            if _within(total):
                return self._finished(rows, keys, weights, logits, total)
            self._levelled = True
        logits = self._scores.block(rows, keys)
        level = logits.amax(-1, keepdim=True)
        weights, total = self._raised(logits.sub_(level), rows)
        return self._finished(rows, keys, weights, logits, total, level[..., 0])

    def _raised(self, logits: Float[Tensor, "b h r k"], rows: slice) -> tuple[Tensor, Tensor]:
        """The powers, and their sum over each row (1 of a row that sees nothing)."""
        into = logits
        if self._apart:
            into = workspace().take("weights", tuple(logits.shape), logits.dtype, logits.device)
        total = torch.exp2(logits, out=into).sum(-1)
        if self._seen is not None:
            total.masked_fill_(~self._seen[:, :, rows], 1.0)
        return into, total

    def _finished(
        self,
        rows: slice,
        keys: slice,
        weights: Float[Tensor, "b h r k"],
        logits: Float[Tensor, "b h r k"],
        total: Float[Tensor, "b h r"],
        level: Float[Tensor, "b h r"] | float = 0.0,
    ) -> Block:
        inverse, (asked, shares) = total.reciprocal(), self._peaks
        peak = row_peaks(weights, inverse, shares=shares) if asked else None
        norm = (total.log2() + level) * _NATS if self._normed else None
        if self._normalised:
            weights.mul_(inverse[..., None])
            if self._apart:
                logits.sub_(total.log2()[..., None])
        left = None if self._normalised else inverse
        return Block(rows, keys, weights, logits, peak, inverse=left, unit=_NATS, norm=norm)


def _within(total: Float[Tensor, "b h r"]) -> bool:
    least, most = torch.aminmax(total)
    return float(least) >= _LEAST and float(most) <= _MOST
