"""Traces of pictures made by hand for analyzers that look closely at visual tokens."""

from __future__ import annotations

from hashlib import sha256

import numpy as np

from sinklens.inputs.spans import Kind, ModalitySpans, PatchGrid, Picture
from sinklens.models.spec import ModelInfo
from sinklens.tracers.trace import LayerInfo, PromptRecord, Trace

ROWS, COLS, TEXT, DIM = 4, 5, 3, 32
VISUAL = ROWS * COLS
LENGTH = 1 + VISUAL + 1 + TEXT
"""BOS, the picture row by row, a delimiter, the question."""


def spans(index: int = 0, members: np.ndarray | None = None) -> ModalitySpans:
    kinds = [Kind.SYSTEM, *[Kind.VISUAL] * VISUAL, Kind.DELIMITER, *[Kind.QUESTION] * TEXT]
    positions = np.arange(1, 1 + VISUAL).reshape(ROWS, COLS)
    grid = PatchGrid(0, "whole", positions, (0.0, 0.0, 50.0, 40.0), members)
    name = f"{index}.png"
    return ModalitySpans(
        np.array(kinds), (Picture(name, 50, 40, sha256(name.encode()).hexdigest()),), (grid,)
    )


def record(index: int = 0, members: np.ndarray | None = None, **arrays: np.ndarray) -> PromptRecord:
    """One prompt with one picture; arrays are given as they are recorded."""
    ids = np.arange(LENGTH)
    pieces = tuple(f"t{i}" for i in ids)
    return PromptRecord(index, ids, pieces, f"made:{index}", "", dict(arrays), spans(index, members))


def trace(records: list[PromptRecord], layers: int = 8, **manifest: object) -> Trace:
    kinds = {"attention": True, "down_proj": True, "experts": False, "shared_expert": False}
    table = tuple(LayerInfo(i, residual="block output", **kinds) for i in range(layers))
    info = ModelInfo("example/made", None, "made", layers, 4, 4, DIM, 0, "float32")
    return Trace(info, table, records, {}, dict(manifest))


def received(by_position: np.ndarray, queries: int = TEXT) -> dict[str, np.ndarray]:
    """`queries_received` and `queries_visible` from means `[layer, pos]`: the text as a whole, its last token alike."""
    layers, length = by_position.shape
    visible = np.zeros((layers, 3, length), dtype=np.int32)
    visible[:, 0], visible[:, 1] = queries, 1
    total = np.stack([by_position * queries, by_position, np.zeros_like(by_position)], 1)
    return {"queries_received": total.astype(np.float32), "queries_visible": visible}
