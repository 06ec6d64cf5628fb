"""Where the recorders of one batch put their arrays: by prompt, name and layer, without padding.

Padding is dropped here and nowhere later: a record knows only the real tokens of its prompt, numbered from 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sinklens.core.errors import ModelError

from .batch import Batch
from .experts import Routed
from .signals import ALL_SIGNALS, REFERENCES, Signal, Source

Arrays = dict[str, np.ndarray]

USERS_OF_REFERENCES = frozenset(
    signal
    for signal in ALL_SIGNALS
    if "reference" in signal.axes or "birth" in signal.axes or signal.name == "qk_cosine_others"
)
"""Signals that look at the reference positions of a prompt."""


@dataclass(frozen=True)
class Limits:
    """How much a record keeps.

    Attributes:
        leading: First positions that are always kept per head.
        strongest: Positions kept besides, those to which any one head gives most. The peak of every position
            is recorded, so an analyzer can tell whether one that was left out could have mattered.
        ranks: Entries kept per layer in ranked signals.
        min_visible: Queries that must see a position before it can be one of the strongest.
        lens_every: The embedding lens looks at the states entering every so many blocks; 0 is the first only.
    """

    leading: int = 16
    strongest: int = 48
    ranks: int = 64
    min_visible: int = 16
    lens_every: int = 0


class Ledger:
    """The arrays of one batch while it runs.

    Attributes:
        real: `real[b]` are the places of prompt b's real tokens in the padded row; None if all are real.
        references: `references[b]` are the reference positions of prompt b in the running block (see
            `signals.REFERENCES`), -1 where there is none yet. The recorder of the attention seam moves the leader
            just before a block's attention runs, so attention, states and experts of a block see the same one.
        carried: Names of the attributes that a block hands on to the next; every recorder says its own.
        attention_leads: Whether that recorder decides the leader; without attention the states' recorder does.
        routed: What the experts of the running block did, until the block ends.
    """

    carried = ("references",)

    def __init__(self, batch: Batch, layers: int, wanted: Iterable[Signal], limits: Limits) -> None:
        self.batch, self.layers, self.wanted, self.limits = batch, layers, frozenset(wanted), limits
        self.real: list[Tensor] | None = None
        if batch.valid is not None:
            self.real = [row.nonzero().squeeze(-1) for row in batch.valid]
        self.seen: list[dict[str, dict[int, np.ndarray]]] = [{} for _ in range(batch.size)]
        self._spans: dict[torch.device, list[slice | Tensor]] = {}
        self.references: list[list[int]] = [[0] + [-1] * (REFERENCES - 1) for _ in range(batch.size)]
        self.routed: dict[int, Routed] = {}
        self.attention_leads = any(signal.source is Source.ATTENTION for signal in self.wanted)

    def places(self, length: int, device: torch.device) -> list[Tensor]:
        """Places of the real tokens of each prompt, in a row of `length`."""
        if self.real is not None:
            return [places.to(device) for places in self.real]
        return [torch.arange(length, device=device)] * self.batch.size

    def spans(self, length: int, device: torch.device) -> list[slice | Tensor]:
        """The same as indices: a slice where the places follow each other, which makes views instead of copies."""
        if self.real is None:
            return [slice(0, length)] * self.batch.size
        if device not in self._spans:
            self._spans[device] = [_as_slice(places) for places in self.places(length, device)]
        return self._spans[device]

    def row(self, row: int, state: Tensor) -> Tensor:
        """The real tokens of one prompt, `[pos, dim]`: a view where they follow each other."""
        state = self._unfolded(state)
        return state[row][self.spans(state.shape[1], state.device)[row]]

    def rows(self, state: Tensor) -> Iterable[tuple[int, Tensor]]:
        """The real tokens of each prompt, `[pos, dim]`; flat outputs are unfolded first."""
        state = self._unfolded(state)
        for row, places in enumerate(self.places(state.shape[1], state.device)):
            whole = len(places) == state.shape[1]
            yield row, state[row] if whole else state[row][places]

    def _unfolded(self, state: Tensor) -> Tensor:
        """A state or an output, flat or not, as `[batch, pos, dim]`.

        Raises:
            ModelError: It has more rows than there are tokens.
        """
        found = state.detach().reshape(self.batch.size, -1, state.shape[-1])
        if self.batch.valid is not None and found.shape[1] != self.batch.valid.shape[1]:
            raise ModelError(
                "This model's states cannot be measured: they are not one vector per token.",
                detail=f"Found {list(state.shape)} for {list(self.batch.valid.shape)} tokens. Neither streams side by "
                "side, which blocks mix, nor tokens that the model adds are read.",
                hint="Its attention can be measured: --analyzers primary-sinks",
            )
        return found

    def put(self, row: int, name: str, layer: int, value: Tensor | np.ndarray) -> None:
        """Store what a layer shows of prompt `row` under a signal's name."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        self.seen[row].setdefault(name, {})[layer] = array

    def shown(self, layer: int) -> Arrays:
        """What a layer showed of all prompts, by `row/name`."""
        return {
            f"{row}/{name}": by_layer[layer]
            for row, seen in enumerate(self.seen)
            for name, by_layer in seen.items()
            if layer in by_layer
        }

    def forget(self, layer: int) -> None:
        """Let go of what a layer showed. No other layer looks at it; only the records do."""
        for seen in self.seen:
            for by_layer in seen.values():
                by_layer.pop(layer, None)

    def recall(self, layer: int, shown: Arrays) -> None:
        """Put back what a layer showed."""
        for key, array in shown.items():
            row, _, name = key.partition("/")
            self.put(int(row), name, layer, array)

    def arrays(self, row: int) -> Arrays:
        """Everything of one prompt, layers stacked."""
        return {name: join(by_layer, self.layers) for name, by_layer in self.seen[row].items()}


def _as_slice(places: Tensor) -> slice | Tensor:
    first, last = (int(places[0]), int(places[-1])) if len(places) else (0, -1)
    return slice(first, last + 1) if last - first + 1 == len(places) else places


def join(by_layer: dict[int, np.ndarray], layers: int) -> np.ndarray:
    """Stack the layers that were seen; the others hold NaN or -1."""
    sample = next(iter(by_layer.values()))
    fill = np.nan if np.issubdtype(sample.dtype, np.floating) else -1
    joined = np.full((layers, *sample.shape), fill, dtype=sample.dtype)
    for layer, array in by_layer.items():
        joined[layer] = array
    return joined
