"""Exact order statistics of |x| for hidden states: the largest entries with their places, and the median.

Sorting a whole layer state would cost as much as the layer. Both functions touch every entry a constant number
of times and are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_SAMPLE = 16_384


@dataclass(frozen=True)
class Largest:
    """The entries of largest magnitude, strongest first; ties are ordered by position, then dim."""

    value: Float[Tensor, " rank"]
    pos: Int[Tensor, " rank"]
    dim: Int[Tensor, " rank"]


def largest_magnitudes(x: Float[Tensor, "pos dim"], count: int) -> Largest:
    """The `count` entries of `x` with the largest magnitude, signed, in float32.

    They lie in at most `count` rows, and those rows have the largest row maxima: only they are sorted.
    """
    row_max = row_abs_max(x)
    rows = torch.topk(row_max, min(count, len(row_max))).indices.sort().values
    part = x[rows].float()
    order = torch.sort(part.abs().flatten(), descending=True, stable=True).indices[:count]
    row, dim = order // x.shape[1], order % x.shape[1]
    return Largest(part[row, dim], rows[row], dim)


def row_abs_max(x: Float[Tensor, "pos dim"]) -> Float[Tensor, " pos"]:
    """`max_dim |x|` of each row, float32, without a copy of `|x|`."""
    low, high = torch.aminmax(x, dim=-1)
    return torch.maximum(high, -low).float()


def lower_median_magnitude(x: Float[Tensor, "..."]) -> float:
    """The lower median of |x| (the element of rank (n - 1) // 2), exactly, as `torch.median` defines it.

    Values outside a bracket estimated from a sample are only counted; those inside are selected from. If the
    bracket misses the median, which the counts reveal, everything is selected from.
    """
    flat = x.flatten().abs()
    rank = (flat.numel() - 1) // 2
    if flat.numel() <= 4 * _SAMPLE:
        return float(flat.float().kthvalue(rank + 1).values)
    low, high = _bracket(flat)
    below = int(torch.count_nonzero(flat < low))
    inside = flat[(flat >= low) & (flat <= high)]
    if below <= rank < below + inside.numel():
        return float(inside.float().kthvalue(rank - below + 1).values)
    return float(flat.float().kthvalue(rank + 1).values)


def _bracket(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds that hold the median unless the strided sample is very unlike the rest (four standard errors)."""
    # An odd stride does not beat against power-of-two widths, so all dims are sampled.
    sample = flat[:: max(1, flat.numel() // _SAMPLE) | 1].float().sort().values
    half_width = int(4 * 0.5 * len(sample) ** 0.5)
    middle = len(sample) // 2
    return sample[max(0, middle - half_width)], sample[min(len(sample) - 1, middle + half_width)]
