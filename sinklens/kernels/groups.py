"""Mass on sets of keys, and what those keys write: by gathered columns if sets are small, else by products.

Mitigations stand on these two numbers (an edited output is `o + Σ_g (c_g − 1) · o_g`), so they are exact.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .shapes import Sizes
from .spec import Stat, Want
from .walk import Chunk

# Gathering costs one memory access per row and column, a product one pass over all columns.
_MOST_GATHERED = 32


class KeyGroups:
    """The `groups` of a `Want`, prepared once per call.

    Attributes:
        n: Number of groups.
    """

    def __init__(self, want: Want, sizes: Sizes, value: Float[Tensor, "batch kv_head key value_dim"]) -> None:
        assert want.groups is not None  # sizes_of refuses such a call
        groups = want.groups if want.groups.ndim == 4 else want.groups[:, :, None]
        self.n, self._group_size = groups.shape[0], sizes.group
        self._member = groups.permute(1, 2, 0, 3)  # batch 1|head group key
        self._value = value if Stat.GROUP_OUTPUT in want.stats else None
        widest = int(groups.sum(-1).max()) if groups.numel() else 0
        self._width = widest if self.n * widest <= _MOST_GATHERED else None
        if self._width is not None:
            found = self._member.to(torch.float32).topk(self._width, dim=-1)
            self._columns, self._valid = found.indices, found.values > 0  # batch 1|head group width

    def mass(self, weights: Tensor, chunk: Chunk, keys: slice) -> Float[Tensor, "b h r group"]:
        """`sum_{k in group} weights` for a block of weights `[b, h, r, keys]`."""
        if self._width is not None:
            return self._gathered(weights, chunk, keys).sum(-1)
        member = self._of(self._member, chunk)[..., keys].mT.to(weights.dtype)  # b 1|h key group
        if member.shape[1] == 1:
            b, h, r, k = weights.shape
            return (weights.reshape(b, h * r, k) @ member[:, 0]).view(b, h, r, self.n)
        return weights @ member

    def output(
        self, weights: Tensor, chunk: Chunk, keys: slice, scratch: Tensor
    ) -> Float[Tensor, "b h r group value_dim"]:
        """`sum_{k in group} weights v_k`. Overwrites `scratch`, which has the shape of `weights`."""
        assert self._value is not None  # only called if GROUP_OUTPUT is wanted
        value = self._value[chunk.batch, chunk.kv_heads]
        b, h, r, k = weights.shape
        u, d = value.shape[1], value.shape[3]
        if self._width is not None:
            picked = self._gathered(weights, chunk, keys)
            columns = self._of(self._columns, chunk).expand(-1, h, -1, -1)
            columns = columns.reshape(b, h, -1, 1).expand(-1, -1, -1, d)
            per_head = value[:, :, None].expand(-1, -1, self._group_size, -1, -1).flatten(1, 2)
            values = per_head.gather(2, columns).view(b, h, self.n, self._width, d)
            return torch.einsum("bhrgm,bhgmd->bhrgd", picked, values)
        value = value[:, :, keys].reshape(b * u, k, d)
        member = self._of(self._member, chunk)[..., keys]
        parts = []
        for group in range(self.n):
            torch.mul(weights, member[:, :, group, None], out=scratch)
            parts.append(torch.bmm(scratch.view(b * u, -1, k), value).view(b, h, r, d))
        return torch.stack(parts, 3)

    def _of(self, table: Tensor, chunk: Chunk) -> Tensor:
        return table[chunk.batch, chunk.heads if table.shape[1] > 1 else slice(None)]

    def _gathered(self, weights: Tensor, chunk: Chunk, keys: slice) -> Float[Tensor, "b h r group width"]:
        """The groups' columns; 0 where a group is narrower, and where a column lies outside the block."""
        b, h, r, _ = weights.shape
        columns = self._of(self._columns, chunk)
        inside = self._of(self._valid, chunk) & (columns >= keys.start) & (columns < keys.stop)
        local = torch.where(inside, columns - keys.start, 0).flatten(2)[:, :, None]
        found = weights.gather(3, local.expand(b, h, r, -1)) * inside.flatten(2)[:, :, None]
        return found.view(b, h, r, self.n, -1) if self._width else found.new_zeros(b, h, r, self.n, 0)
