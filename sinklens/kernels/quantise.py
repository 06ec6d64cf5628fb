"""Round-to-nearest quantisation, computed and undone at once: what is left is the rounding error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.core.errors import UsageError

Granularity = Literal["tensor", "row", "column", "group"]


@dataclass(frozen=True)
class Scheme:
    """A uniform integer grid.

    Attributes:
        bits: 2 to 16.
        by: What shares a scale: the whole `tensor`, a `row`, a `column`, or a `group` of neighbours in a row.
        symmetric: Whether 0 is the middle of the grid. Otherwise the grid spans the smallest to the largest value, 0
            included, so that 0 stays 0.
        group: Values per group; the last one of a row may have fewer.
    """

    bits: int
    by: Granularity = "row"
    symmetric: bool = True
    group: int = 128

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 16:
            raise UsageError(f"{self.bits} bits are not a grid of integers; give 2 to 16.")
        if self.by not in ("tensor", "row", "column", "group"):
            raise UsageError(
                f"Unknown granularity {self.by!r}.", detail="It may be tensor, row, column or group."
            )
        if self.group < 1:
            raise UsageError(f"A group of {self.group} values is none; give 1 or more.")


def fake_quantised(
    x: Float[Tensor, "matrix row column"],
    scheme: Scheme,
    kept: Bool[Tensor, "#matrix #row #column"] | None = None,
) -> Float[Tensor, "matrix row column"]:
    """Every value at the nearest point of its grid; halves go to the even point. Each matrix has its own scales.

    Symmetric: `s = max|x| / (2^(b-1) - 1)`, `x' = s round(x / s)`. Otherwise with `l = min(x, 0)`, `h = max(x, 0)`:
    `s = (h - l) / (2^b - 1)`, `z = round(-l / s)`, `x' = s (clamp(round(x / s) + z, 0, 2^b - 1) - z)`. Computed in
    float32 or better and returned in the type of `x`.

    Args:
        kept: Values that stay as they are, to the bit, and have no part in any scale.
    """
    if x.numel() == 0:
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    stays = torch.zeros_like(wide, dtype=torch.bool) if kept is None else kept.expand_as(wide)
    grouped, inside = _grouped(wide, scheme), _grouped(stays, scheme, fill=True)
    rounded = _rounded(grouped, inside, scheme)
    return torch.where(stays, x, _restored(rounded, wide, scheme).to(x.dtype))


def _rounded(x: Tensor, kept: Tensor, scheme: Scheme) -> Tensor:
    """Along the last axis, which shares a scale."""
    counted = x.masked_fill(kept, 0.0)
    if scheme.symmetric:
        top = 2 ** (scheme.bits - 1) - 1
        scale = _positive(counted.abs().amax(-1, keepdim=True) / top)
        return (x / scale).round().clamp(-top - 1, top) * scale
    low, high = counted.amin(-1, keepdim=True).clamp(max=0), counted.amax(-1, keepdim=True).clamp(min=0)
    top = 2**scheme.bits - 1
    scale = _positive((high - low) / top)
    zero = (-low / scale).round()
    return (((x / scale).round() + zero).clamp(0, top) - zero) * scale


def _positive(scale: Tensor) -> Tensor:
    """A scale of 0 belongs to values that are all 0; any other gives 0 too."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _grouped(x: Tensor, scheme: Scheme, *, fill: bool | float = 0.0) -> Tensor:
    """With what shares a scale along the last axis."""
    if scheme.by == "tensor":
        return x.flatten(1)
    if scheme.by == "column":
        return x.transpose(1, 2)
    if scheme.by == "row":
        return x
    columns = x.shape[-1]
    short = -columns % scheme.group
    return torch.nn.functional.pad(x, (0, short), value=fill).unflatten(-1, (-1, scheme.group))


def _restored(x: Tensor, like: Tensor, scheme: Scheme) -> Tensor:
    if scheme.by == "tensor":
        return x.view_as(like)
    if scheme.by == "column":
        return x.transpose(1, 2)
    return x if scheme.by == "row" else x.flatten(-2)[..., : like.shape[-1]]
