"""Tokens that an intervention is about: all of some kinds, or those at given positions of each prompt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from sinklens.core.errors import DataError
from sinklens.inputs.spans import Kind

from .batch import Batch
from .interventions import rows_of, shape_of


@dataclass(frozen=True)
class Chosen:
    """Tokens of a batch, as data.

    Attributes:
        kinds: Tokens of these kinds; used where no positions are given.
        positions: `(prompt, position)` pairs, `prompt` being `Prompt.index`, or None for every prompt.

    Example:
        >>> Chosen()  # all visual tokens
        >>> Chosen.at({3: [5, 6], 4: [9]})  # these positions of prompts 3 and 4
    """

    kinds: tuple[Kind, ...] = (Kind.VISUAL,)
    positions: tuple[tuple[int | None, int], ...] | None = None

    @classmethod
    def at(cls, positions: dict[int, Iterable[int]] | Iterable[int]) -> Chosen:
        """Positions by prompt, or the same ones in every prompt."""
        if isinstance(positions, dict):
            pairs = [(int(p), int(at)) for p, places in positions.items() for at in places]
            return cls(positions=tuple(sorted(pairs)))
        return cls(positions=tuple((None, int(at)) for at in sorted({int(at) for at in positions})))

    def mask(self, batch: Batch) -> Bool[Tensor, "batch token"]:
        """The tokens, in the padded rows.

        Raises:
            DataError: They are chosen by kind and no prompt of the batch has such a token.
        """
        rows, tokens = shape_of(batch)
        out = torch.zeros(rows, tokens, dtype=torch.bool)
        for row, places in enumerate(rows_of(batch, tokens)):
            mine = self._of(batch, row, len(places))
            out[row, places.cpu()[torch.from_numpy(mine)]] = True
        if self.positions is None and not bool(out.any()):
            raise DataError(
                "No prompt of the batch has a token of a picture.",
                detail="Which tokens are visual is said by `Prompt.visual.spans`.",
                hint="Give prompts with pictures, or positions: Chosen.at([...]).",
            )
        return out

    def _of(self, batch: Batch, row: int, length: int) -> np.ndarray:
        """Positions in one prompt."""
        prompt = batch.prompts[row] if batch.prompts else None
        if self.positions is not None:
            index = None if prompt is None else prompt.index
            return np.array(
                sorted({at for p, at in self.positions if (p is None or p == index) and 0 <= at < length}),
                dtype=np.int64,
            )
        if prompt is None or prompt.visual is None:
            return np.zeros(0, dtype=np.int64)
        return np.flatnonzero(prompt.visual.spans.is_(*self.kinds))


def at_places(mask: Bool[Tensor, "batch token"], places: Tensor) -> Bool[Tensor, "batch place"]:
    """What a mask says of places, False for those behind its end: generated tokens."""
    tokens = mask.shape[1]
    inside = (places >= 0) & (places < tokens)
    return mask[:, places.clamp(0, tokens - 1)] & inside
