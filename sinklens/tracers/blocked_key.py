"""Hiding one key from the queries after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sinklens.models.spec import OpenedModel

from .batch import Batch
from .interventions import Acted, places_of
from .masking import pairs_hidden


@dataclass(frozen=True)
class KeyBlocked:
    """No query but its own sees the key of one position, in all blocks; rows share their attention among the rest."""

    position: int

    @contextmanager
    def applied(self, opened: OpenedModel, batch: Batch) -> Iterator[Acted]:
        acted, places = Acted(), list(places_of(batch, self.position))

        def hide(
            queries: Int[Tensor, " query"], keys: Int[Tensor, " key"]
        ) -> Bool[Tensor, "batch query key"]:
            gone = torch.zeros(batch.size, len(queries), len(keys), dtype=torch.bool)
            for row, place in places:
                gone[row] = (keys == place) & (queries != place)[:, None]
            acted.edited += len(places)
            return gone

        with pairs_hidden(opened, batch, range(len(opened.anatomy.main.blocks)), hide):
            yield acted
