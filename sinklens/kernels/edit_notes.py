"""The edit of a map, put together block by block while it is made."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from .edits import MapEdit
from .gains import scale_of
from .key_sets import Factors, KeySets, Shares
from .shapes import Sizes


class EditNotes:
    """An edit as it comes about, block by block."""

    def __init__(self, edit: MapEdit) -> None:
        self.edit = edit

    @classmethod
    def of(cls, sets: KeySets, sizes: Sizes, own: Tensor | None, kind: torch.dtype) -> EditNotes:
        """No row edited yet."""
        device, (batch, heads, count, _) = sets.columns.device, sets.columns.shape
        members = torch.full((batch, heads, sizes.keys + 1), count, device=device)
        # Columns that are not there go to one more key, which is cut off.
        places = torch.where(sets.valid, sets.columns, sizes.keys).flatten(2)
        names = torch.arange(count, device=device).repeat_interleave(sets.columns.shape[3])
        members.scatter_(2, places, names.expand_as(places))
        rows = (sizes.batch, sizes.heads, sizes.queries)
        ones = torch.ones(rows, dtype=kind, device=device)
        scale = torch.ones(*rows, count + 1, dtype=kind, device=device)
        own = None if own is None else own[None]
        return cls(MapEdit(members[..., :-1], scale, ones, own=own))

    def keep(
        self,
        rows: slice | Tensor,
        shares: Shares,
        found: Factors,
        edited: Bool[Tensor, "b h r"],
        among: Bool[Tensor, "b h r"] | None = None,
    ) -> None:
        """What became of some rows.

        Args:
            among: Only these; the others were kept before.
        """
        one, edit = torch.ones_like(shares.rest), self.edit
        rest = torch.where(edited, found.kept * one / found.divisor, 1.0)
        scale = torch.where(edited[..., None], scale_of(shares, replace(found, edited=edited)), 1.0)
        scale = torch.cat([scale, rest[..., None]], -1)
        learned = rest if found.learned else one
        for kept, value in ((edit.scale, scale), (edit.learned, learned)):
            if among is not None:
                value = torch.where(among[(..., *(None,) * (value.ndim - 3))], value, kept[:, :, rows])
            kept[:, :, rows] = value
