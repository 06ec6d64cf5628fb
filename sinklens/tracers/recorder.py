"""From what the taps see to the records of a batch: one recorder per seam over one ledger, joined at the end."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from sinklens.inputs.spec import Prompt

from . import signals as sig
from .batch import Batch
from .ledger import Ledger, Limits
from .record_attention import AttentionRecorder, keep_positions
from .record_experts import ExpertsRecorder
from .record_inputs import InputsRecorder
from .record_pictures import PicturesRecorder
from .record_reading import join_reading
from .record_states import StatesRecorder
from .record_visual import TextQueriesRecorder
from .signals import Signal
from .sink_dims import SinkRule
from .trace import PromptRecord

__all__ = ["Limits", "Recorder"]


class Recorder:
    """Collects one batch."""

    def __init__(
        self,
        batch: Batch,
        layers: int,
        wanted: Iterable[Signal],
        limits: Limits,
        sinks: SinkRule | None = None,
    ) -> None:
        self.ledger = Ledger(batch, layers, wanted, limits)
        self.inputs = InputsRecorder(self.ledger, sinks)
        self.attention = AttentionRecorder(self.ledger)
        self.inputs.settle_references = self.attention.leaders.choose
        self.attention.text_queries = TextQueriesRecorder(self.ledger, self.inputs)
        self.pictures = PicturesRecorder(self.ledger, limits.lens_every)
        self.attention.pictures = self.pictures
        self.states = StatesRecorder(self.ledger)
        self.experts = ExpertsRecorder(self.ledger)

    def records(self) -> list[PromptRecord]:
        """The records of the batch, one per prompt, in batch order."""
        return [self._record(row) for row in range(self.ledger.batch.size)]

    def _record(self, row: int) -> PromptRecord:
        arrays = self.ledger.arrays(row) | self.states.arrays(row) | self.inputs.arrays(row)
        join_reading(arrays)
        self.pictures.finish(row, arrays)
        if sig.ATTENTION_RECEIVED.name in arrays:
            keep_positions(arrays, self.ledger.limits)
        for name in (sig.ROUTER_CHOICE.name, sig.ROUTER_WEIGHT.name):
            if name in arrays and sig.KEPT_POSITIONS.name in arrays:
                arrays[name] = arrays[name][:, arrays[sig.KEPT_POSITIONS.name]]
        if row in self.attention.sampled:
            arrays[sig.SAMPLED_ROWS] = self.attention.sampled[row]
        prompt = (
            self.ledger.batch.prompts[row]
            if self.ledger.batch.prompts
            else _anonymous(row, len(self._tokens(row)))
        )
        visual = prompt.visual
        if visual is not None:
            arrays |= {f"thumbnail_{i}": picture for i, picture in enumerate(visual.thumbnails)}
        return PromptRecord(
            prompt.index,
            np.asarray(prompt.token_ids, dtype=np.int64),
            prompt.pieces,
            prompt.source,
            prompt.domain,
            arrays,
            None if visual is None else visual.spans,
        )

    def _tokens(self, row: int) -> Tensor:
        if self.ledger.real is not None:
            return self.ledger.real[row]
        seen = self.ledger.seen[row]
        norms = seen.get(sig.RESIDUAL_NORM.name) or seen.get(sig.VISIBLE_QUERIES.name) or {}
        return torch.arange(len(next(iter(norms.values()), ())))


def _anonymous(row: int, length: int) -> Prompt:
    return Prompt(row, (-1,) * length, ("",) * length, f"input:{row}")
