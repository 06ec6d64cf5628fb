"""What methods share that raise logits of visual tokens where a token is chosen: rows, layers, the gain."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sinklens.core.errors import UsageError
from sinklens.kernels.key_sets import Gains
from sinklens.models.spec import OpenedModel, Tower

from .base import Mitigation, Seen
from .kinds import choosing_rows, needs_pictures


@dataclass(frozen=True, kw_only=True)
class LooksHarder(Mitigation):
    """Base of methods that raise logits of visual tokens in the rows that choose a token.

    Args:
        start, end: First layer, and the one after the last; None for the last layer of the model.
    """

    start: int = 2
    end: int | None = None

    logits_needed = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start < 0 or (self.end is not None and self.end <= self.start):
            raise UsageError(
                f"{self.name}: start and end must be layers with start before end, got {self.start} and {self.end}."
            )

    def own_layers(self, count: int) -> Collection[int]:
        return range(self.start, count if self.end is None else min(self.end, count))

    def check(self, tower: Tower) -> None:
        super().check(tower)
        if self.layers is None and self.heads is None and not self.own_layers(len(tower.blocks)):
            raise UsageError(
                f"{self.name}: there is no layer {self.start}.",
                detail=f"The model has layers 0 to {len(tower.blocks) - 1}.",
                hint="Give a smaller start.",
            )

    def fitted(self, model: nn.Module | OpenedModel, tower: Tower) -> Self:
        needs_pictures(self.title, model)
        return self

    def rows(self, seen: Seen) -> Bool[Tensor, "batch query"]:
        return choosing_rows(seen)


def raised(
    logits: Float[Tensor, "batch head row key"], alpha: float | Float[Tensor, "batch 1 1 key"]
) -> Gains:
    """Logits z that become z + alpha |z|; `alpha` may differ from key to key."""
    gains = alpha * logits.abs()
    return Gains(gains, torch.ones_like(gains[..., 0], dtype=torch.bool))
