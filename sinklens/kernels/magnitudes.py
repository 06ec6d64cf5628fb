"""Exact order statistics of |x| for hidden states: the largest entries with their places, and the median.

Sorting a whole layer state would cost as much as the layer. Here every entry is touched a few times, and only a
small part is ever sorted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Largest:
    """The entries of largest magnitude, strongest first; ties are ordered by position, then dim."""

    value: Float[Tensor, " rank"]
    pos: Int[Tensor, " rank"]
    dim: Int[Tensor, " rank"]


def largest_magnitudes(x: Float[Tensor, "pos dim"], count: int) -> Largest:
    """The `count` entries of `x` with the largest magnitude, signed, in float32 (fewer if `x` has fewer).

    They lie in at most `count` rows, and those rows have the largest row maxima: only they are looked at.
    """
    row_max = x.abs().amax(-1)
    kept = min(count, len(row_max))
    # Rows that tie with the last one kept take part, so that ties are broken by position and not by chance.
    rows = (row_max >= torch.topk(row_max, kept).values[-1]).nonzero().squeeze(-1)
    part = x[rows].float()
    size = part.abs().flatten()
    cut = torch.topk(size, min(count, len(size))).values[-1]
    found = (size >= cut).nonzero().squeeze(-1)
    order = found[torch.sort(size[found], descending=True, stable=True).indices][:count]
    row, dim = order // x.shape[1], order % x.shape[1]
    return Largest(part[row, dim], rows[row], dim)


def lower_median_magnitude(x: Float[Tensor, "..."]) -> float:
    """The lower median of |x| (the element of rank (n - 1) // 2), exactly, as `torch.median` defines it."""
    size = x.detach().abs().flatten().float()
    rank = (size.numel() - 1) // 2
    if size.is_cuda:
        return float(size.median())
    # numpy selects without sorting, with vector instructions where the processor has them: an order of magnitude
    # faster than torch's kthvalue on the CPU.
    return float(np.partition(size.numpy(), rank)[rank])
