"""Signals of the experts seam: maxima per expert, and how tokens were routed."""

from __future__ import annotations

import numpy as np

from . import signals as sig
from .attention import Site
from .experts import Routed
from .ledger import Arrays, Ledger


class ExpertsRecorder:
    """Collects what one batch shows at the experts seam."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.routed_rows = 0

    def on_experts(self, site: Site, routed: Routed) -> None:
        """Per-prompt maxima over the routed rows; padding is routed too and is dropped here."""
        tokens = len(routed.expert) // routed.slots
        expert = routed.expert.view(self.ledger.batch.size, tokens // self.ledger.batch.size, routed.slots)
        self.routed_rows += int((expert < routed.n_experts).sum())
        fields = {name: getattr(routed, name).view(expert.shape) for name in ("value", "dim", "weight")}
        for row, places in enumerate(self.ledger.places(expert.shape[1], expert.device)):
            mine = {name: field[row][places].cpu().numpy() for name, field in fields.items()}
            chosen = expert[row][places].cpu().numpy()
            for name, array in _expert_maxima(chosen, mine["value"], mine["dim"], routed.n_experts).items():
                self.ledger.put(row, name, site.layer, array)
            self.ledger.put(row, sig.ROUTER_CHOICE.name, site.layer, chosen.astype(np.int32))
            self.ledger.put(row, sig.ROUTER_WEIGHT.name, site.layer, mine["weight"])


def _expert_maxima(expert: np.ndarray, value: np.ndarray, dim: np.ndarray, n_experts: int) -> Arrays:
    """Per expert: the largest entry with its place, the first routed row, and the number of tokens.

    Args:
        expert, value, dim: `[pos, slot]`, as in `Routed`.
    """
    pos, slot = np.indices(expert.shape).reshape(2, -1)
    flat, magnitude = expert.ravel(), np.abs(value).ravel()
    keep = flat < n_experts
    pos, slot, flat, magnitude = pos[keep], slot[keep], flat[keep], magnitude[keep]
    out = {
        "expert_max": np.full(n_experts, np.nan, dtype=np.float32),
        "expert_max_pos": np.full(n_experts, -1, dtype=np.int32),
        "expert_max_dim": np.full(n_experts, -1, dtype=np.int32),
        "expert_first_row": np.full(n_experts, np.nan, dtype=np.float32),
        "expert_tokens": np.bincount(flat, minlength=n_experts).astype(np.int32),
    }
    by_size = np.lexsort((pos, -magnitude, flat))
    seen, first = np.unique(flat[by_size], return_index=True)
    top = by_size[first]
    out["expert_max"][seen] = value[pos[top], slot[top]]
    out["expert_max_pos"][seen] = pos[top]
    out["expert_max_dim"][seen] = dim[pos[top], slot[top]]
    # Per-expert loops order routed rows by slot, then token.
    by_slot = np.lexsort((pos, slot, flat))
    seen, first = np.unique(flat[by_slot], return_index=True)
    out["expert_first_row"][seen] = magnitude[by_slot[first]]
    return out
