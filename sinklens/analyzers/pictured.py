"""What analyzers of pictures read from a trace in the same way: prompts with pictures, cells, tokens in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sinklens.inputs.spans import Kind, ModalitySpans
from sinklens.tracers import signals_pictures as pic
from sinklens.tracers.signal import Signal
from sinklens.tracers.trace import PromptRecord, Trace

from .visual import NO_PICTURES


@dataclass(frozen=True)
class Cell:
    """One visual token: its place among the visual tokens of the prompt, and in its picture."""

    place: int
    position: int
    image: int
    view: str
    row: int
    col: int


def with_pictures(trace: Trace, *signals: Signal) -> list[PromptRecord]:
    """Records with visual tokens and all of these signals."""
    return [
        record
        for record in trace
        if record.spans is not None
        and bool(record.spans.visual.any())
        and all(signal.name in record.arrays for signal in signals)
    ]


def why_none(trace: Trace, *signals: Signal) -> str | None:
    """Why an analyzer of pictures does not apply, None if it does."""
    if not with_pictures(trace):
        return NO_PICTURES
    if not with_pictures(trace, *signals):
        names = ", ".join(signal.name for signal in signals)
        return f"the trace does not hold {names}; profile again with this analyzer."
    return None


def spans_of(record: PromptRecord) -> ModalitySpans:
    assert record.spans is not None
    return record.spans


def visual_positions(record: PromptRecord) -> Int[np.ndarray, " visual"]:
    return spans_of(record).visual.nonzero()[0]


def cells_of(record: PromptRecord) -> Iterator[Cell]:
    """The visual tokens of a prompt, grid by grid."""
    order = {int(position): place for place, position in enumerate(visual_positions(record))}
    for grid in spans_of(record).grids:
        for (row, col), position in np.ndenumerate(grid.positions):
            if position >= 0:
                yield Cell(order[int(position)], int(position), grid.picture, grid.view, row, col)


def text_positions(record: PromptRecord) -> Int[np.ndarray, " text"]:
    """Text after the first picture, the model's own answer included."""
    return spans_of(record).is_(Kind.QUESTION, Kind.GENERATED).nonzero()[0]


def text_received(record: PromptRecord, query_set: int = 0) -> Float[np.ndarray, "layer pos"]:
    """Mean attention of a set of queries to each key, over the queries that see it and heads; NaN if none does."""
    total, seen = record[pic.QUERIES_RECEIVED][:, query_set], record[pic.QUERIES_VISIBLE][:, query_set]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(seen > 0, total.astype(np.float64) / seen, np.nan)


def distinct_pictures(
    records: list[PromptRecord],
) -> list[tuple[PromptRecord, int, Int[np.ndarray, " visual"]]]:
    """Every picture once, with the places of its tokens among its prompt's visual ones, in order of the prompts."""
    seen: set[tuple[str, str]] = set()
    found = []
    for record in records:
        cells = list(cells_of(record))
        for image, picture in enumerate(spans_of(record).pictures):
            key = (picture.sha256, "" if len(picture.sha256) == 64 else f"{record.index} {picture.name}")
            places = np.array([cell.place for cell in cells if cell.image == image], dtype=int)
            if key not in seen and len(places):
                seen.add(key)
                found.append((record, image, places))
    return found


def word(trace: Trace, token: int) -> str:
    """Display string of a vocabulary entry; its number where the run did not note it."""
    words = trace.manifest.get("words") or {}
    return str(words.get(str(token), f"<{token}>"))
