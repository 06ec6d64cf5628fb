"""Writers and readers of packed formats, one number at a time with Python's integers: what the fast ones must equal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

MASK = 2**32 - 1


def words(values: Sequence[int], bits: int) -> list[int]:
    """Values as one long number, the first one lowest, cut into signed words of 32 bits."""
    number = sum(value << bits * i for i, value in enumerate(values))
    count = -(-len(values) * bits // 32)
    return [signed(number >> 32 * i & MASK) for i in range(count)]


def values(found: Iterable[int], bits: int, count: int) -> list[int]:
    """The first `count` values of such words."""
    number = sum((word & MASK) << 32 * i for i, word in enumerate(found))
    return [number >> bits * i & 2**bits - 1 for i in range(count)]


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def packed_rows(codes: Tensor, bits: int) -> Tensor:
    """Each row of codes as words."""
    return torch.tensor([words(row, bits) for row in codes.tolist()], dtype=torch.int32)


def packed_columns(codes: Tensor, bits: int) -> Tensor:
    """Each column of codes as words."""
    return packed_rows(codes.T, bits).T.contiguous()


def drawn(shape: Sequence[int], low: int, high: int, generator: torch.Generator) -> Tensor:
    """Integers from `low` to `high`, both of which are met."""
    found = torch.randint(low, high + 1, tuple(shape), generator=generator)
    found.view(-1)[0], found.view(-1)[-1] = low, high
    return found


def scales(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype, size: float) -> Tensor:
    """Positive scales of about `size`."""
    return (size * (0.5 + torch.rand(tuple(shape), generator=generator))).to(dtype)
