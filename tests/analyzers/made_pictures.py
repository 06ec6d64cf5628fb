"""Traces of prompts with pictures, made by hand: what each token is, and the signals an analyzer reads."""

from __future__ import annotations

from typing import Any

import numpy as np

from sinklens.inputs.spans import Kind, ModalitySpans, PatchGrid, Picture
from sinklens.models.spec import ModelInfo
from sinklens.tracers import signals as sig
from sinklens.tracers.sink_dims import SinkDim, SinkDims, SinkRule
from sinklens.tracers.trace import LayerInfo, PromptRecord, Trace

LAYERS, HEADS, ROWS, COLS, SIZE = 5, 3, 2, 4, 4096
LENGTH = 1 + ROWS * COLS + 1 + 3
"""BOS, a grid of 2 x 4 visual tokens, a delimiter, three tokens of the question."""
FOUND = SinkDims((SinkDim(17, 40.0, 0.5, 20.0),), SIZE, "discovered", "2 text prompts", "measured")


def spans(name: str = "cat.png") -> ModalitySpans:
    visual = ROWS * COLS
    kinds = [Kind.SYSTEM, *[Kind.VISUAL] * visual, Kind.DELIMITER, *[Kind.QUESTION] * 3]
    grid = PatchGrid(0, "whole", 1 + np.arange(visual).reshape(ROWS, COLS), (0.0, 0.0, 40.0, 20.0))
    return ModalitySpans(np.array(kinds), (Picture(name, 40, 20, "00"),), (grid,))


def record(index: int = 0, **arrays: np.ndarray) -> PromptRecord:
    """A prompt of `LENGTH` tokens with one picture."""
    tokens = np.arange(LENGTH)
    return PromptRecord(
        index, tokens, tuple(map(str, tokens)), f"made:{index}", "", dict(arrays), spans(f"cat{index}.png")
    )


def made(
    records: list[PromptRecord], dims: SinkDims | None = FOUND, model: str = "example/vlm", **rule: Any
) -> Trace:
    layers = tuple(
        LayerInfo(
            i, attention=True, down_proj=True, experts=False, shared_expert=False, residual="block output"
        )
        for i in range(LAYERS)
    )
    size = SIZE if dims is None else dims.hidden_size
    info = ModelInfo(model, None, "made", LAYERS, HEADS, HEADS, size, 0, "float32")
    tracing = {"sinks": None if dims is None else SinkRule(dims, **rule).to_json()}
    return Trace(info, layers, records, tracing)


def phi_record(
    index: int, sinks: dict[tuple[int, int], float], ordinary: float = 1.0, least: float = 9.1
) -> PromptRecord:
    """φ by (layer, position), `ordinary` elsewhere; the list of entries from `least` on agrees, on dim 17.

    The text gives every visual token 0.05 and a sink 0.4.
    """
    phi = np.full((LAYERS, LENGTH), ordinary, dtype=np.float32)
    received = np.full((LAYERS, LENGTH), 0.05, dtype=np.float32)
    for (layer, position), value in sinks.items():
        phi[layer, position], received[layer, position] = value, 0.4
    listed = sorted(place for place, value in sinks.items() if value >= least)
    name = sig.INPUT_LARGE.name
    places = np.array(listed, dtype=np.int32).reshape(-1, 2)
    return record(
        index,
        phi=phi,
        text_received=received,
        input_typical=np.full((LAYERS, 4), 0.5, dtype=np.float16),
        **{
            name: np.array([-sinks[place] for place in listed], dtype=np.float32),
            f"{name}_layer": places[:, 0],
            f"{name}_pos": places[:, 1],
            f"{name}_dim": np.full(len(listed), 17, dtype=np.int32),
        },
    )
