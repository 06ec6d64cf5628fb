"""The Trace: labelled reductions for a set of prompts, and how they merge.

The prompt is the unit of merging. Every prompt keeps its own reductions, so that thresholds can be applied per
prompt before anything is averaged, runs can be resumed and split over processes in any order, and definitions
(epsilon, percentile, recipe) can be changed on a loaded trace without the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np

from sinklens.core.card import card
from sinklens.core.errors import DataError
from sinklens.inputs.spans import ModalitySpans
from sinklens.models.spec import ModelInfo, Tower

from .signals import BY_NAME, Signal

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class LayerInfo:
    """What kind of block a layer is: whether it has softmax attention, and what writes its feed-forward output."""

    index: int
    attention: bool
    down_proj: bool
    experts: bool
    shared_expert: bool
    residual: str
    """`block output`, or `LayerNorm input` for post-norm blocks."""


def layer_table(tower: Tower) -> tuple[LayerInfo, ...]:
    """The layers of a tower as data that a saved trace can carry."""
    return tuple(
        LayerInfo(
            block.index,
            attention=block.attention is not None,
            down_proj=block.down_proj is not None,
            experts=block.experts is not None,
            shared_expert=block.shared_down_proj is not None,
            residual="block output" if block.residual_norm is None else "LayerNorm input",
        )
        for block in tower.blocks
    )


@dataclass
class PromptRecord:
    """The reductions of one prompt. `arrays` is keyed by signal name; `<name>_pos` and `<name>_dim` give places.

    `spans` says which tokens are parts of pictures; None for text alone. `thumbnail_<i>` among the arrays is a small
    RGB copy of picture `i`.
    """

    index: int
    token_ids: np.ndarray
    pieces: tuple[str, ...]
    source: str
    domain: str
    arrays: dict[str, np.ndarray]
    spans: ModalitySpans | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, signal: Signal | str) -> np.ndarray:
        name = signal if isinstance(signal, str) else signal.name
        try:
            return self.arrays[name]
        except KeyError:
            raise DataError(
                f"The trace has no signal {name!r}.",
                detail=f"It has: {', '.join(sorted(self.arrays))}.",
                hint="Profile again with an analyzer that needs it.",
            ) from None

    def describe(self) -> dict[str, Any]:
        """Everything but the arrays, for `prompts.jsonl`."""
        described = {
            "index": self.index,
            "source": self.source,
            "domain": self.domain,
            "n_tokens": len(self),
            "sha256": sha256(self.token_ids.astype("<i8").tobytes()).hexdigest(),
            "token_ids": self.token_ids.tolist(),
            "pieces": list(self.pieces),
        }
        return described if self.spans is None else {**described, "spans": self.spans.to_json()}


@dataclass
class Trace:
    """Reductions of a set of prompts through one model.

    Attributes:
        layers: One entry per block of the profiled tower.
        tracing: How it was recorded: mode, attention path, signals, and the numbers of kept positions and ranks.
        manifest: Everything else needed to repeat the run.
    """

    info: ModelInfo
    layers: tuple[LayerInfo, ...]
    records: list[PromptRecord]
    tracing: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[PromptRecord]:
        return iter(self.records)

    def __repr__(self) -> str:
        tokens = sum(len(record) for record in self.records)
        return f"Trace({self.info.id}: {len(self)} prompts, {tokens} tokens, {len(self.layers)} layers)"

    def _repr_html_(self) -> str:
        recorded = sorted(self.signals, key=lambda signal: signal.name)
        rows = [
            {"signal": s.name, "axes": " × ".join(s.axes), "unit": s.unit, "meaning": s.meaning}
            for s in recorded
        ]
        return card("Trace", repr(self), rows=rows, most=len(rows))

    @property
    def signals(self) -> frozenset[Signal]:
        """The signals every record has."""
        if not self.records:
            return frozenset()
        names = set.intersection(*(set(record.arrays) for record in self.records))
        return frozenset(BY_NAME[name] for name in names if name in BY_NAME)

    @property
    def shortest(self) -> int:
        """Length in tokens of the shortest prompt, 0 for an empty trace."""
        return min((len(record) for record in self.records), default=0)

    def stack(self, signal: Signal) -> np.ndarray:
        """`[prompt, ...]` for signals without an axis that differs in length by prompt."""
        ragged = {"pos", "kept", "large", "visual", "value", "patch"} & set(signal.axes)
        if ragged:
            raise ValueError(f"{signal.name} has a ragged axis {ragged}; read it prompt by prompt")
        return np.stack([record[signal] for record in self.records])

    def merge(self, *others: Trace) -> Trace:
        """This trace and others of the same model and tracing, in prompt order; the order of merging is irrelevant.

        Raises:
            DataError: Different models, or a prompt that is in more than one of them.
        """
        for other in others:
            if (other.info.id, other.info.revision) != (self.info.id, self.info.revision):
                raise DataError(
                    f"Traces of different models cannot be merged: {self.info.id} and {other.info.id}.",
                    hint="To set two models side by side: sinklens compare RUN RUN",
                )
        records = sorted((r for t in (self, *others) for r in t.records), key=lambda r: r.index)
        if len({record.index for record in records}) < len(records):
            raise DataError("The traces share prompts, so merging them would count those twice.")
        return Trace(self.info, self.layers, records, self.tracing, self.manifest)

    def to_frame(self, signal: Signal | str) -> pd.DataFrame:
        """A signal as a tidy table: one row per number, one column per axis, and `value`."""
        import pandas as pd

        signal = BY_NAME[signal] if isinstance(signal, str) else signal
        frames = [_tidy(record, signal) for record in self.records]
        frame = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
        frame.attrs.update(unit=signal.unit, meaning=signal.meaning)
        return frame

    def token_at(self, record: PromptRecord, pos: int) -> tuple[str, int]:
        """Display string and id of a token."""
        return record.pieces[pos], int(record.token_ids[pos])


def _tidy(record: PromptRecord, signal: Signal) -> pd.DataFrame:
    import pandas as pd

    values = record[signal]
    grid = np.indices(values.shape).reshape(values.ndim, -1)
    columns: dict[str, Any] = {"prompt": record.index, **dict(zip(signal.axes, grid, strict=True))}
    if "kept" in columns:
        columns["pos"] = record["kept_positions"][columns.pop("kept")]
    frame = pd.DataFrame({**columns, "value": values.ravel()})
    for place in ("layer", "pos", "dim"):
        if place not in columns and f"{signal.name}_{place}" in record.arrays:
            frame[place] = record.arrays[f"{signal.name}_{place}"].ravel()
    return frame


def as_plain(layers: Iterable[LayerInfo]) -> list[dict[str, Any]]:
    return [asdict(layer) for layer in layers]
