"""Integers of a few bits out of the words they are packed in: a stream of bits, the lowest of each word first."""

from __future__ import annotations

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

WORD = 32
"""Bits of a word. So many values take `bits` words, whatever their bits: the layout repeats after them."""


def unpack(words: Int32[Tensor, "..."], bits: int, count: int, dim: int) -> UInt8[Tensor, "..."]:
    """The values along an axis of words.

    Value `i` is in the bits `i * bits` to `(i + 1) * bits - 1` of the stream, so it may begin in one word and end in
    the next (3, 5, 6 and 7 bits).

    Args:
        words: Any shape.
        bits: 1 to 8.
        count: Values along `dim`; the words hold at least so many.
        dim: The axis that is packed.
    """
    shape = list(words.shape)
    shape[dim] = count
    values = torch.empty(shape, dtype=torch.uint8)
    along, source = values.movedim(dim, 0), words.movedim(dim, 0)
    for phase in range(min(WORD, count)):
        word, low = divmod(phase * bits, WORD)
        into = along[phase::WORD]
        found = source[word::bits][: len(into)] >> low  # keeps the sign, above what is taken
        kept = min(bits, WORD - low)
        found &= (1 << kept) - 1
        if kept < bits:
            found |= (source[word + 1 :: bits][: len(into)] & ((1 << bits - kept) - 1)) << kept
        into.copy_(found)
    return values


def words_for(count: int, bits: int) -> int:
    """Words that so many values take."""
    return -(-count * bits // WORD)
