"""Mass on sets of keys, and what those keys write: by gathered columns if sets are small, else by products.

Mitigations stand on these two numbers (an edited output is `o + Σ_g (c_g − 1) · o_g`), so they are exact.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Gathering costs one memory access per row and column, a product one pass over all columns.
_MOST_GATHERED = 32
# So few keys in all are taken one by one, which needs no search.
_MOST_SINGLE = 4


class KeyGroups:
    """Key sets, prepared once for all blocks of rows.

    Args:
        groups: Membership `[batch, 1|head, group, key]`.
        value: `[batch, kv_head, key, value_dim]`, in the precision of the result; None if only masses are
        wanted.
    """

    def __init__(self, groups: Tensor, value: Tensor | None) -> None:
        self._member, self._value = groups, value
        self.n = groups.shape[2]
        self._singles = _singles(groups)
        widest = int(groups.sum(-1).max()) if groups.numel() else 0
        self._width = widest if self.n * widest <= _MOST_GATHERED else None
        if self._width is not None:
            found = groups.to(torch.float32).topk(self._width, dim=-1)
            self._columns, self._valid = found.indices.flatten(2), (found.values > 0).flatten(2)

    def columns(self, heads: int) -> Int[Tensor, "batch head column"] | None:
        """Keys of narrow groups, in the order that `folded` expects, those that are none far below 0; else None."""
        if self._width is None:
            return None
        return torch.where(self._valid, self._columns, -(2**40)).expand(-1, heads, -1)

    def folded(self, found: Float[Tensor, "b h r column"]) -> Float[Tensor, "b h r group"]:
        """Masses of narrow groups from the weights at their columns."""
        return found if self._width == 1 else found.unflatten(-1, (self.n, self._width or 0)).sum(-1)

    def mass(self, weights: Float[Tensor, "b h r k"], keys: slice) -> Float[Tensor, "b h r group"]:
        """`sum_{k in group} weights` for weights of the keys in `keys`."""
        b, h, r, k = weights.shape
        if self._singles is not None:
            found = weights.new_zeros(b, h, r, self.n)
            for group, key in self._singles:
                if keys.start <= key < keys.stop:
                    found[..., group].add_(weights[..., key - keys.start])
            return found
        if self._width is not None:
            return self.folded(self._gathered(weights, keys))
        member = self._member[..., keys].mT.to(weights.dtype)  # b 1|h key group
        if member.shape[1] == 1:
            return (weights.reshape(b, h * r, k) @ member[:, 0]).view(b, h, r, self.n)
        return weights @ member

    def output(
        self, weights: Float[Tensor, "b h r k"], keys: slice, scratch: Float[Tensor, "b h r k"]
    ) -> Float[Tensor, "b h r group value_dim"]:
        """`sum_{k in group} weights v_k`. Overwrites `scratch`."""
        assert self._value is not None  # only asked for with a value
        b, h, r, k = weights.shape
        kv_heads, d = self._value.shape[1], self._value.shape[3]
        if self._width is not None:
            picked = self._gathered(weights, keys).unflatten(-1, (self.n, self._width))
            columns = self._columns.expand(b, h, -1)[..., None].expand(-1, -1, -1, d)
            per_head = self._value[:, :, None].expand(-1, -1, h // kv_heads, -1, -1).flatten(1, 2)
            values = per_head.gather(2, columns).unflatten(2, (self.n, self._width))
            return torch.einsum("bhrgm,bhgmd->bhrgd", picked, values)
        value = self._value[:, :, keys].reshape(b * kv_heads, k, d)
        member = self._member[..., keys]
        parts = []
        for group in range(self.n):
            torch.mul(weights, member[:, :, group, None], out=scratch)
            parts.append(torch.bmm(scratch.view(b * kv_heads, -1, k), value).view(b, h, r, d))
        return torch.stack(parts, 3)

    def _gathered(self, weights: Tensor, keys: slice) -> Float[Tensor, "b h r columns"]:
        """The groups' columns, 0 where a group is narrower and where a column lies outside of `keys`."""
        inside = self._valid & (self._columns >= keys.start) & (self._columns < keys.stop)
        local = torch.where(inside, self._columns - keys.start, 0)[:, :, None]
        return weights.gather(3, local.expand(*weights.shape[:3], -1)) * inside[:, :, None]


def _singles(groups: Tensor) -> list[tuple[int, int]] | None:
    """Group and key of each member, if they are the same for all prompts and heads and very few."""
    if not groups.numel() or not bool((groups == groups[:1, :1]).all()):
        return None
    members = groups[0, 0].nonzero()
    return [(group, key) for group, key in members.tolist()] if len(members) <= _MOST_SINGLE else None
