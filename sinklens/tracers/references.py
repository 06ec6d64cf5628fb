"""Which positions are looked at more closely while a prompt runs, before anyone knows where its sinks are.

The first token, and the leader: of the other positions that enough queries see, the one that received most attention
in the blocks before. A block's own attention cannot take part, because the mass on the leader is summed while that
attention is computed; so in the first block there is no leader yet.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .ledger import Ledger
from .prompt_view import PromptView


class Leaders:
    """Follows, prompt by prompt, which position leads."""

    carried = ("_received", "_visible")

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._received: dict[int, Float[Tensor, " pos"]] = {}
        self._visible: dict[int, Int[Tensor, " pos"]] = {}

    def add(self, view: PromptView) -> None:
        """Count what the positions of a prompt received in a block, as the mean over heads."""
        share, visible = view.share.mean(0), view.visible.amax(0)
        if view.row in self._received:
            share = share + self._received[view.row]
            visible = torch.maximum(visible, self._visible[view.row])
        self._received[view.row], self._visible[view.row] = share, visible

    def choose(self) -> None:
        """Write the leader of the blocks so far into the ledger; without new blocks nothing changes."""
        for row, received in self._received.items():
            enough = seen_by_enough(self._visible[row], self.ledger.limits.min_visible)
            enough[:1] = False
            leader = int(received.masked_fill(~enough, -1.0).argmax()) if bool(enough.any()) else -1
            self.ledger.references[row][1] = leader


def seen_by_enough(visible: Int[Tensor, " pos"], least: int) -> Bool[Tensor, " pos"]:
    """Positions seen by at least `least` queries, or by as many as see any position."""
    return visible >= visible.max().clamp(max=least) if len(visible) else visible.bool()
