"""What a rule did to an attention map, without the map: a factor per row for each set of keys and for the rest.

Rules that move attention mass say of every row by what its weights are multiplied, set by set. That is all that is
needed to walk the edited map block by block, to measure it, or to edit it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class MapEdit:
    """An edit of a map: `A'[q, k] = scale[q, set of k] A[q, k]`.

    Attributes:
        sets: Set of each key; the number of sets for keys in none.
        scale: Factor per row and set, the last one that of keys in no set. 1 in rows that were not edited.
        learned: Factor per row of the mass on learned sinks, which have no key.
        added: Mass per row that went to something that is no key (a bias put before all keys); None for nothing.
        rows: The query rows that the third axis stands for, where it is not all of them in order.
        own: Column of each row's own key where that is a member of no set; None if it may be one.
    """

    sets: Int[Tensor, "#batch #head key"]
    scale: Float[Tensor, "batch head row set_or_rest"]
    learned: Float[Tensor, "batch head row"]
    added: Float[Tensor, "batch head row"] | None = None
    rows: Int[Tensor, "batch row"] | None = None
    own: Int[Tensor, "#batch query"] | None = None

    def of(self, batch: slice, heads: slice | Tensor) -> MapEdit:
        """The edit of some batch rows and heads."""
        sets = self.sets[batch] if self.sets.shape[0] > 1 else self.sets
        return replace(
            self,
            sets=sets[:, heads] if sets.shape[1] > 1 else sets,
            scale=self.scale[batch][:, heads],
            learned=self.learned[batch][:, heads],
            added=None if self.added is None else self.added[batch][:, heads],
            rows=None if self.rows is None else self.rows[batch],
            own=self.own[batch] if self.own is not None and self.own.shape[0] > 1 else self.own,
        )

    def of_rows(self, rows: Int[Tensor, "batch row"]) -> MapEdit:
        """The edit of some rows of each batch row, in that order."""
        own = None if self.own is None else self.own.expand(len(rows), -1).gather(1, rows)
        if self.rows is None:
            scale, learned, added = self._picked(rows)
            return replace(self, scale=scale, learned=learned, added=added, own=own)
        hit = rows[:, :, None] == self.rows[:, None]  # batch row stored
        found = hit.any(-1)[:, None]
        scale, learned, added = self._picked(hit.int().argmax(-1))
        scale = torch.where(found[..., None], scale, 1.0)
        learned = torch.where(found, learned, 1.0)
        added = None if added is None else torch.where(found, added, 0.0)
        return replace(self, scale=scale, learned=learned, added=added, rows=None, own=own)

    def _picked(self, index: Int[Tensor, "batch row"]) -> tuple[Tensor, Tensor, Tensor | None]:
        index = index[:, None].expand(-1, self.scale.shape[1], -1)
        wide = index[..., None].expand(-1, -1, -1, self.scale.shape[3])
        added = None if self.added is None else self.added.gather(2, index)
        return self.scale.gather(2, wide), self.learned.gather(2, index), added

    def of_keys(self, keys: Int[Tensor, " key"]) -> MapEdit:
        """The edit of some keys, in that order."""
        own = None
        if self.own is not None:
            hit = self.own[..., None] == keys
            own = torch.where(hit.any(-1), hit.int().argmax(-1), -1)
        return replace(self, sets=self.sets[..., keys], own=own)

    def of_block(self, rows: slice) -> MapEdit:
        """The edit of a range of rows."""
        if self.rows is not None:
            index = torch.arange(rows.start, rows.stop, device=self.scale.device)
            return self.of_rows(index.expand(self.scale.shape[0], -1))
        return replace(
            self,
            scale=self.scale[:, :, rows],
            learned=self.learned[:, :, rows],
            added=None if self.added is None else self.added[:, :, rows],
            own=None if self.own is None else self.own[:, rows],
        )

    def at(self, columns: Int[Tensor, "batch #head column"]) -> Float[Tensor, "batch head row column"]:  # noqa: F821
        """Factors at some columns, for the rows this edit has."""
        batch, heads, rows, _ = self.scale.shape
        both = max(self.sets.shape[1], columns.shape[1])
        sets = self.sets.expand(batch, both, -1).gather(2, columns.expand(batch, both, -1))
        index = sets[:, :, None].expand(batch, heads, rows, -1)
        found = self.scale.gather(3, index)
        if self.own is None:
            return found
        own = columns[:, :, None] == self.own[:, None, :, None]
        return torch.where(own, self.scale[..., -1:], found)


def edited(
    weights: Float[Tensor, "batch head row key"],
    learned: Float[Tensor, "batch head row"],
    edits: Sequence[MapEdit],
    rows: slice,
    keys: slice,
) -> tuple[Float[Tensor, "batch head row key"], Float[Tensor, "batch head row"]]:
    """A block of a map after all edits, and the mass that is on no key (learned sinks, biases)."""
    columns = torch.arange(keys.start, keys.stop, device=weights.device)[None, None]
    for edit in edits:
        part = edit.of_block(rows)
        # Some edits are told in double precision; the map keeps its own.
        weights = (weights * part.at(columns.expand(weights.shape[0], -1, -1))).to(weights.dtype)
        learned = (learned * part.learned).to(learned.dtype)
        learned = learned if part.added is None else (learned + part.added).to(learned.dtype)
    return weights, learned


def edited_map(
    weights: Float[Tensor, "batch head query key"], edit: MapEdit
) -> Float[Tensor, "batch head query key"]:
    """A whole map after an edit, for kernels that hand out their weights."""
    everything = slice(0, weights.shape[2]), slice(0, weights.shape[3])
    wide = weights.to(edit.scale.dtype)
    return edited(wide, wide[..., 0], [edit], *everything)[0].to(weights.dtype)


def off_keys(
    learned: Float[Tensor, "batch head row"], edits: Sequence[MapEdit], rows: slice
) -> Float[Tensor, "batch head row"]:
    """Mass of a range of rows on no key after all edits; `learned` is that before them."""
    for edit in edits:
        part = edit.of_block(rows)
        learned = learned * part.learned
        learned = learned if part.added is None else learned + part.added
    return learned


def among(
    edits: Sequence[MapEdit], batch: int, rows: Int[Tensor, " row"], keys: Int[Tensor, " key"]
) -> tuple[MapEdit, ...]:
    """The edits of some rows and keys of one batch row."""
    one = slice(batch, batch + 1)
    return tuple(edit.of(one, slice(None)).of_rows(rows[None]).of_keys(keys) for edit in edits)
