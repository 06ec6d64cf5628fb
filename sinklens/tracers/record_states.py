"""Signals of the hidden states: norms, largest entries, medians."""

from __future__ import annotations

import torch
from torch import Tensor

from sinklens.kernels.magnitudes import largest_magnitudes, lower_median_magnitude

from . import signals as sig
from .ledger import Ledger
from .signals import Signal


class StatesRecorder:
    """Collects what one batch shows in the residual stream and after the down projections."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def on_residual(self, layer: int, state: Tensor) -> None:
        for row, x in self.ledger.rows(state):
            self.ledger.put(row, sig.RESIDUAL_NORM.name, layer, torch.linalg.vector_norm(x.float(), dim=-1))
            if sig.RESIDUAL_TOP in self.ledger.wanted:
                self._put_largest(row, sig.RESIDUAL_TOP, layer, x)
            if sig.RESIDUAL_MEDIAN in self.ledger.wanted:
                self.ledger.put(row, sig.RESIDUAL_MEDIAN.name, layer, torch.tensor(lower_median_magnitude(x)))

    def on_down_proj(self, layer: int, output: Tensor) -> None:
        for row, x in self.ledger.rows(output):
            self._put_largest(row, sig.DOWN_PROJ_TOP, layer, x)

    def _put_largest(self, row: int, signal: Signal, layer: int, x: Tensor) -> None:
        top = largest_magnitudes(x, self.ledger.limits.ranks)
        missing = self.ledger.limits.ranks - len(top.value)
        pad = torch.nn.functional.pad
        self.ledger.put(row, signal.name, layer, pad(top.value, (0, missing), value=float("nan")))
        self.ledger.put(row, f"{signal.name}_pos", layer, pad(top.pos, (0, missing), value=-1))
        self.ledger.put(row, f"{signal.name}_dim", layer, pad(top.dim, (0, missing), value=-1))
