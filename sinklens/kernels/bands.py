"""Sums over few keys near the diagonal: keys nearer than a window, rows at some distance from a key."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def nearness(
    weights: Float[Tensor, "b h r k"], rows: slice, keys: slice, offset: int, window: int
) -> Float[Tensor, "b h r"]:
    """`sum_k P relu(w - d)`, for `min(d, w) = w - relu(w - d)`: only keys nearer than the window matter.

    Args:
        weights: Of the query rows `rows` and the keys `keys`; row `q` is at key `q + offset`.
    """
    place = torch.arange(rows.start, rows.stop, device=weights.device)[:, None] + offset
    first = max(keys.start, rows.start + offset - window + 1)
    key = torch.arange(first, max(first, keys.stop), device=weights.device)
    near = weights[..., first - keys.start :]
    return torch.einsum("bhrk,rk->bhr", near, (window - (place - key)).clamp_min(0).to(near.dtype))


def add_band(
    into: Float[Tensor, "b h key"],
    weights: Float[Tensor, "b h r k"],
    scale: Float[Tensor, "b h r"],
    rows: slice,
    keys: slice,
    offset: int,
    band: tuple[int, int],
) -> None:
    """Add to `into` the `scale`-weighted sum over the rows that are `band[0]` to `band[1]` after each key."""
    first = max(keys.start, rows.start + offset - band[1])
    stop = min(keys.stop, rows.stop + offset - band[0])
    if stop <= first:
        return
    device = weights.device
    place = torch.arange(rows.start, rows.stop, device=device)[:, None] + offset
    distance = place - torch.arange(first, stop, device=device)
    inside = ((distance >= band[0]) & (distance <= band[1])).to(weights.dtype)
    part = weights[..., first - keys.start : stop - keys.start]
    into[..., first:stop] += torch.einsum("bhrk,rk,bhr->bhk", part, inside, scale)
