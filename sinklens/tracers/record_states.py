"""Signals of the hidden states: norms, largest entries, medians, cosines with the reference positions."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sinklens.kernels.magnitudes import Largest, largest_magnitudes, lower_median_magnitude

from . import signals as sig
from .ledger import Arrays, Ledger
from .record_births import BIRTH_SIGNALS, BirthsRecorder, cosines
from .record_writes import ENTRY_SIGNALS, WritesRecorder
from .signals import Signal
from .states import BlockPass

NORM_SIGNALS = frozenset({sig.RESIDUAL_COSINE, *BIRTH_SIGNALS})


class StatesRecorder:
    """Collects what one batch shows in the residual stream and after the down projections."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.writes = WritesRecorder(ledger)
        self.births = BirthsRecorder(ledger)

    @property
    def closely(self) -> bool:
        """Whether a wanted signal looks inside blocks."""
        return bool(self.ledger.wanted & (ENTRY_SIGNALS | BIRTH_SIGNALS))

    def on_block(self, passed: BlockPass) -> None:
        """The states after one block, prompt by prompt."""
        assert passed.after is not None
        layer, wanted = passed.block.index, self.ledger.wanted
        for row, x in self.ledger.rows(passed.after):
            norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
            self.ledger.put(row, sig.RESIDUAL_NORM.name, layer, norm)
            self._lead(row, norm)
            top = self._largest(row, layer, x)
            if sig.RESIDUAL_MEDIAN in wanted:
                self.ledger.put(row, sig.RESIDUAL_MEDIAN.name, layer, torch.tensor(lower_median_magnitude(x)))
            if wanted & NORM_SIGNALS:
                cosine = cosines(x, norm, self.ledger.references[row])
                if sig.RESIDUAL_COSINE in wanted:
                    self.ledger.put(row, sig.RESIDUAL_COSINE.name, layer, cosine)
                if wanted & BIRTH_SIGNALS:
                    self.births.see(row, passed, norm, cosine)
            if wanted & ENTRY_SIGNALS and top is not None:
                self.writes.see(row, passed, top)
        self.ledger.routed.pop(layer, None)

    def on_down_proj(self, layer: int, output: Tensor) -> None:
        for row, x in self.ledger.rows(output):
            self.put_largest(row, sig.DOWN_PROJ_TOP, layer, largest_magnitudes(x, self.ledger.limits.ranks))

    def arrays(self, row: int) -> Arrays:
        """What has no layer axis."""
        return self.births.arrays(row)

    def _lead(self, row: int, norm: Float[Tensor, " pos"]) -> None:
        """Without attention, the leader is the position of largest norm other than the first."""
        if not self.ledger.attention_leads and len(norm) > 1:
            self.ledger.references[row][1] = 1 + int(norm[1:].argmax())

    def _largest(self, row: int, layer: int, x: Tensor) -> Largest | None:
        """The largest entries, as many as any signal asks for."""
        stored, traced = sig.RESIDUAL_TOP in self.ledger.wanted, bool(self.ledger.wanted & ENTRY_SIGNALS)
        if not stored and not traced:
            return None
        count = max(self.ledger.limits.ranks if stored else 0, sig.ENTRIES // 2 if traced else 0)
        top = largest_magnitudes(x, count)
        if stored:
            self.put_largest(row, sig.RESIDUAL_TOP, layer, top)
        return top

    def put_largest(self, row: int, signal: Signal, layer: int, top: Largest) -> None:
        """Store the strongest entries of a layer, padded to the ranks that are kept."""
        ranks = self.ledger.limits.ranks
        missing = max(0, ranks - len(top.value))
        pad = torch.nn.functional.pad
        self.ledger.put(row, signal.name, layer, pad(top.value[:ranks], (0, missing), value=float("nan")))
        self.ledger.put(row, f"{signal.name}_pos", layer, pad(top.pos[:ranks], (0, missing), value=-1))
        self.ledger.put(row, f"{signal.name}_dim", layer, pad(top.dim[:ranks], (0, missing), value=-1))
