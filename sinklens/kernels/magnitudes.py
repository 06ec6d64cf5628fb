"""Exact order statistics of |x| for hidden states: the largest entries with their places, and the median.

Sorting a whole layer state would cost as much as the layer. Here every entry is touched a few times, and only a
small part is ever sorted; with the compiled kernels every entry is read once.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import native

# Below this many entries, bracketing the median costs more than selecting it.
_LEAST_BRACKETED = 65_536
_SAMPLE = 8_192


@dataclass(frozen=True)
class Largest:
    """The entries of largest magnitude, strongest first; ties are ordered by position, then dim."""

    value: Float[Tensor, " rank"]
    pos: Int[Tensor, " rank"]
    dim: Int[Tensor, " rank"]


def largest_magnitudes(x: Float[Tensor, "pos dim"], count: int) -> Largest:
    """The `count` entries of `x` with the largest magnitude, signed, in float32 (fewer if `x` has fewer).

    NaN counts as infinitely large, so that it is seen and not passed over.
    They lie in at most `count` rows, and those rows have the largest row maxima: only they are looked at.
    """
    if not x.numel():
        return Largest(x.new_empty(0, dtype=torch.float32), *x.new_empty(2, 0, dtype=torch.int64))
    row_max = _nan_first(_row_max(x))
    kept = min(count, len(row_max))
    # Rows that tie with the last one kept take part, so that ties are broken by position and not by chance.
    rows = (row_max >= torch.topk(row_max, kept).values[-1]).nonzero().squeeze(-1)
    part = x[rows].float()
    size = _nan_first(part.abs().flatten())
    cut = torch.topk(size, min(count, len(size))).values[-1]
    found = (size >= cut).nonzero().squeeze(-1)
    order = found[torch.sort(size[found], descending=True, stable=True).indices][:count]
    row, dim = order // x.shape[1], order % x.shape[1]
    return Largest(part[row, dim], rows[row], dim)


def lower_median_magnitude(x: Float[Tensor, "..."]) -> float:
    """The lower median of |x| (the element of rank (n - 1) // 2), exactly; NaN if `x` is empty.

    As `torch.median` defines it for numbers. NaN ranks above them all, so that one does not hide the others.
    """
    x = x.detach()
    if not x.numel():
        return math.nan
    if x.is_cuda:
        return float(x.abs().flatten().float().median())
    found = _bracketed_median(x.reshape(-1, x.shape[-1])) if x.ndim else None
    # numpy selects without sorting, with vector instructions where the processor has them: an order of magnitude
    # faster than torch's kthvalue on the CPU.
    return _select(x.abs().flatten().float().numpy(), (x.numel() - 1) // 2) if found is None else found


def lower_medians(x: Float[Tensor, "row column"]) -> Float[Tensor, " column"]:
    """The lower median of each column, exactly; NaN ranks above all numbers.

    Raises:
        ValueError: There are no rows.
    """
    rank = (len(x) - 1) // 2
    if rank < 0:
        raise ValueError("The median of no rows is not defined.")
    if x.device.type != "cpu":
        return x.kthvalue(rank + 1, dim=0).values
    columns = _single(x.detach()).T.contiguous().numpy()
    return torch.from_numpy(np.partition(columns, rank, axis=1)[:, rank].copy()).to(x.dtype)


def _select(values: np.ndarray, rank: int) -> float:
    """The element of that rank; reorders `values`."""
    values.partition(rank)
    return float(values[rank])


def _nan_first(size: Float[Tensor, " entry"]) -> Float[Tensor, " entry"]:
    """Magnitudes with NaN as infinity, which orders before all others."""
    return torch.where(size.isnan(), math.inf, size)


def _row_max(x: Float[Tensor, "pos dim"]) -> Float[Tensor, " pos"]:
    """Largest magnitude of each row."""
    x = _single(x)
    if not _compiled(x):
        return x.abs().amax(-1)
    found = torch.empty(len(x), dtype=torch.float32, device=x.device)
    native.built().sinklens_row_max(
        ctypes.c_void_p(x.data_ptr()),
        *map(ctypes.c_long, (*x.shape, x.stride(0))),
        ctypes.c_void_p(found.data_ptr()),
    )
    return found


def _bracketed_median(x: Float[Tensor, "pos dim"]) -> float | None:
    """The lower median, from the entries between two quantiles of a sample; None if it is not among those."""
    n, dim = x.numel(), x.shape[-1]
    if n < _LEAST_BRACKETED or not _compiled(x := _single(x)):
        return None
    step = n // _SAMPLE
    while math.gcd(step, dim) > 1:  # or the sample would hold some dims and not others
        step += 1
    places = np.arange(0, n, step)
    sample = np.sort(np.abs(x.numpy()[places // dim, places % dim]))
    middle, margin = (len(sample) - 1) // 2, 2 * math.isqrt(len(sample))  # four standard deviations
    low, high = float(sample[max(0, middle - margin)]), float(sample[middle + margin])
    room = n // 8
    kept, counts = torch.empty(room + 32, dtype=torch.float32, device=x.device), (ctypes.c_long * 2)()
    native.built().sinklens_between(
        ctypes.c_void_p(x.data_ptr()),
        *map(ctypes.c_long, (*x.shape, x.stride(0))),
        ctypes.c_float(low),
        ctypes.c_float(high),
        ctypes.c_void_p(kept.data_ptr()),
        ctypes.c_long(room),
        counts,
    )
    rank, (below, among) = (n - 1) // 2, counts
    if not below <= rank < below + among:
        return None
    return _select(kept[:among].numpy(), rank - below)


def _single(x: Float[Tensor, "pos dim"]) -> Float[Tensor, "pos dim"]:
    """Half-precision numbers as float32, which holds them exactly and which the processor is faster at."""
    return x.float() if x.dtype.itemsize == 2 and x.device.type == "cpu" else x


def _compiled(x: Tensor) -> bool:
    """Whether the compiled kernels can read it."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.stride(-1) == 1 and native.available()
