"""Sets of keys, how rows share their attention among them, and what a rule makes of that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.errors import UsageError
from .shapes import Sizes, sizes_of
from .spec import AttentionCall, Want


@dataclass(frozen=True)
class KeySets:
    """Sets of keys as columns of the call, padded to a common width.

    Attributes:
        columns: Key indices; any number where `valid` is False.
        valid: Which columns are there. A key belongs to one set at most.
        keep_own: A row's own key is never a member (a query that keeps seeing itself).
        own: Column of each row's own key; None means `row + keys - queries`, as in `AttentionCall`.
    """

    columns: Int[Tensor, "batch set_head group width"]
    valid: Bool[Tensor, "batch set_head group width"]
    keep_own: bool = False
    own: Int[Tensor, " query"] | None = None


@dataclass(frozen=True)
class Shares:
    """How the rows of a block share their attention; the parts of a row add up to 1. All in float32 or float64.

    Attributes:
        mass: On each set.
        rest: On all other keys. Computed as a sum of its own where it would drown in rounding.
        learned: On the learned sink logit, 0 without one.
        logits: Of the keys, where every set is one key and the logits were asked for (nats, as the softmax saw them).
    """

    mass: Float[Tensor, "batch head row group"]
    rest: Float[Tensor, "batch head row"]
    learned: Float[Tensor, "batch head row"]
    logits: Float[Tensor, "batch head row group"] | None = None


@dataclass(frozen=True)
class Factors:
    """What becomes of a block of rows: `A'[k in g] = c_g A / D`, `A'[other k] = kept A / D`.

    Attributes:
        factors: `c_g`, broadcastable to `Shares.mass`.
        divisor: `D`, broadcastable to `Shares.rest`; positive. Entries of rows that are not `edited` are ignored.
        edited: Rows to change; the others keep the kernel's output bit for bit.
        learned: Whether the learned sink's share is divided too. It writes nothing, so only `Transferred.moved` asks.
        kept: Of other keys, and of the learned sink where that is divided.
        made: `c_g A`, where neither factor may be a number of its own; `gains.py` makes it.
    """

    factors: Float[Tensor, "#batch #head #row group"]
    divisor: Float[Tensor, "#batch #head #row"]
    edited: Bool[Tensor, "#batch #head #row"]
    learned: bool = True
    kept: Float[Tensor, "#batch #head #row"] | float = 1.0
    made: Float[Tensor, "batch head row group"] | None = None


@dataclass(frozen=True)
class Gains:
    """What becomes of a block of rows whose logits change: `z'_k = z_k + gain_k`, and the softmax again.

    The logit twin of `Factors`, for sets of one key each: a gain may be larger than any factor that is a number.

    Attributes:
        gains: Broadcastable to `Shares.logits`, finite. Keys that the row does not see have no say.
        edited: Rows to change.
    """

    gains: Float[Tensor, "#batch #head #row group"]
    edited: Bool[Tensor, "#batch #head #row"]


Rule = Callable[[Shares], Factors | Gains]


def key_sets(groups: Bool[Tensor, "group batch key"] | Bool[Tensor, "group batch head key"]) -> KeySets:
    """Sets given as membership, as in `Want.groups`."""
    member = (groups if groups.ndim == 4 else groups[:, :, None]).permute(1, 2, 0, 3)
    width = int(member.sum(-1).max()) if member.numel() else 0
    found = member.to(torch.uint8).sort(dim=-1, descending=True, stable=True)
    return KeySets(found.indices[..., :width], found.values[..., :width] > 0)


@dataclass(frozen=True)
class Columns:
    """The columns of some sets in one line, those that are not there squeezed out as far as all lines allow.

    Attributes:
        index: Key of each column; 0 where there is none.
        valid: Which are there.
        member: 1 where a column belongs to a set; None where the line is still the sets side by side.
    """

    index: Int[Tensor, "batch set_head column"]
    valid: Bool[Tensor, "batch set_head column"]
    groups: int
    member: Float[Tensor, "batch set_head column group"] | None = None

    @classmethod
    def of(cls, sets: KeySets, kind: torch.dtype) -> Columns:
        groups, width = sets.columns.shape[2:]
        index = torch.where(sets.valid, sets.columns, 0).flatten(2)
        valid = sets.valid.flatten(2)
        if groups == 1 or width <= 1:
            return cls(index, valid, groups)
        most = int(valid.sum(-1).max()) if valid.numel() else 0
        if 2 * most > groups * width:
            return cls(index, valid, groups)
        order = valid.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :most]
        valid = valid.gather(2, order)
        names = order // width
        member = torch.nn.functional.one_hot(names, groups).to(kind) * valid[..., None]
        return cls(index.gather(2, order), valid, groups, member)

    def sums(self, weights: Float[Tensor, "batch head row column"]) -> Float[Tensor, "batch head row group"]:
        """Sum over the columns of each set."""
        if self.member is not None:
            return weights @ self.member
        return weights.unflatten(-1, (self.groups, -1)).sum(-1)

    def spread(self, factors: Float[Tensor, "#b #h #r group"]) -> Float[Tensor, "#b #h #r column"]:
        """What belongs to a set, at each of its columns."""
        if self.member is not None:
            return factors @ self.member.mT
        return factors[..., None].expand(*factors.shape, self.index.shape[-1] // self.groups).flatten(3)


def own_columns(sets: KeySets, sizes: Sizes, device: torch.device) -> Int[Tensor, " query"]:
    """Column of each row's own key."""
    if sets.own is not None:
        return sets.own
    return torch.arange(sizes.queries, device=device) + sizes.offset


def checked_sizes(call: AttentionCall, output: Tensor | None, sets: KeySets, rows: Tensor | None) -> Sizes:
    """Sizes of the call, after a look at whether everything fits it."""
    sizes = sizes_of(call, Want(frozenset()))
    expected = (sizes.batch, sizes.queries, sizes.heads, sizes.value_dim)
    wrong = []
    if output is not None and tuple(output.shape) != expected:
        wrong.append(f"output is {tuple(output.shape)}, expected (batch query head value_dim) = {expected}")
    if sets.columns.shape != sets.valid.shape:
        wrong.append(f"columns are {tuple(sets.columns.shape)}, but valid is {tuple(sets.valid.shape)}")
    if sets.columns.shape[0] != sizes.batch or sets.columns.shape[1] not in (1, sizes.heads):
        wrong.append(
            f"columns are {tuple(sets.columns.shape)}, expected ({sizes.batch}, 1 or {sizes.heads}, group, width)"
        )
    if rows is not None and tuple(rows.shape) != (sizes.batch, sizes.queries):
        wrong.append(f"rows are {tuple(rows.shape)}, expected {(sizes.batch, sizes.queries)}")
    if wrong:
        raise UsageError("The key sets do not fit this attention call.", detail="; ".join(wrong) + ".")
    return sizes
