"""Signals of the states that enter blocks: entries that are large for their state, sink dims, and which tokens sink."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.kernels.magnitudes import lower_medians

from . import signals as sig
from .ledger import Arrays, Ledger
from .signals_visual import LEAST_ENERGY, OF_INPUTS, OF_TEXT_QUERIES
from .sink_dims import SinkRule, phi, ratios

_AT_ONCE = 1 << 22
"""Entries of a state that are held in float32 beside it."""
_SAMPLED = 256


class InputsRecorder:
    """Collects what one batch shows where its states enter blocks, and knows the sinks of the running block.

    Attributes:
        sinks: `sinks[b]` are the sinks among the tokens of prompt b in the running block. Only prompts with pictures
            have any.
        settle_references: Decides the reference tokens of the block that begins, from the blocks before it.
    """

    carried = ("_large",)

    def __init__(self, ledger: Ledger, rule: SinkRule | None) -> None:
        self.ledger, self.rule = ledger, rule
        self.sinks: dict[int, Bool[Tensor, " pos"]] = {}
        self._pictured = {row for row, prompt in enumerate(ledger.batch.prompts) if prompt.visual is not None}
        self._large: dict[int, list[tuple[np.ndarray, ...]]] = {}
        self.settle_references: Callable[[], None] | None = None

    @property
    def needed(self) -> bool:
        wanted = self.ledger.wanted
        everywhere = wanted & {sig.INPUT_TYPICAL, sig.INPUT_REFERENCE}
        return bool(everywhere or (self._pictured and wanted & (OF_INPUTS | OF_TEXT_QUERIES)))

    def on_input(self, layer: int, state: Tensor) -> None:
        """The state that enters a block, before anything of the block runs."""
        wanted = self.ledger.wanted
        if sig.INPUT_REFERENCE in wanted and self.settle_references is not None:
            self.settle_references()
        for row, x in self.ledger.rows(state):
            if sig.INPUT_TYPICAL in wanted:
                self.ledger.put(row, sig.INPUT_TYPICAL.name, layer, typical(x))
            if sig.INPUT_REFERENCE in wanted:
                self._reference(row, layer, x)
            if row not in self._pictured:
                continue
            if sig.INPUT_LARGE in wanted:
                self._list_large(row, layer, x)
            if self.rule is not None and self.rule.dims:
                value = phi(x, self.rule.dims.indices)
                self.sinks[row] = self.rule.cut.reached(value)
                if sig.PHI in wanted:
                    self.ledger.put(row, sig.PHI.name, layer, value)

    def _reference(self, row: int, layer: int, x: Float[Tensor, "pos dim"]) -> None:
        """The two tokens that the running block follows."""
        places = self.ledger.references[row]
        found = torch.full((len(places), x.shape[1]), float("nan"), device=x.device)
        for slot, place in enumerate(places):
            if 0 <= place < len(x):
                found[slot] = ratios(x[place])
        self.ledger.put(row, sig.INPUT_REFERENCE.name, layer, found)
        self.ledger.put(row, sig.INPUT_REFERENCE.name + "_pos", layer, np.array(places, dtype=np.int32))

    def _list_large(self, row: int, layer: int, x: Float[Tensor, "pos dim"]) -> None:
        """Entries with enough of their state's energy, in order of position."""
        least = (LEAST_ENERGY * x.shape[1]) ** 0.5
        step = max(1, _AT_ONCE // x.shape[1])
        for start in range(0, len(x), step):
            part = x[start : start + step].float()
            ratio = part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            pos, dim = (ratio.abs() >= least).nonzero(as_tuple=True)
            if len(pos):
                found = (ratio[pos, dim], pos + start, dim)
                value, pos, dim = (tensor.cpu().numpy() for tensor in found)
                layers = np.full(len(value), layer)
                self._large.setdefault(row, []).append((value, layers, pos, dim))

    def arrays(self, row: int) -> Arrays:
        """What has no layer axis: the list of large entries, layer by layer, and within one by position."""
        if sig.INPUT_LARGE not in self.ledger.wanted or row not in self._pictured:
            return {}
        parts = self._large.get(row, [])
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)] or [np.zeros(0)] * 4
        name = sig.INPUT_LARGE.name
        places = {
            f"_{axis}": columns[i].astype(np.int32) for i, axis in enumerate(("layer", "pos", "dim"), 1)
        }
        return {
            name: columns[0].astype(np.float32),
            **{name + suffix: array for suffix, array in places.items()},
        }


def typical(x: Float[Tensor, "pos dim"]) -> Float[Tensor, " dim"]:
    """Lower median of |x| / RMS(x) over tokens: all of them, or 256 that are evenly spread."""
    if len(x) > _SAMPLED:
        x = x[torch.linspace(0, len(x) - 1, _SAMPLED, device=x.device).round().long()]
    return lower_medians(ratios(x)).half()
