"""Hand-made traces of the residual stream: what each sublayer adds goes in, decompositions and births come out.

Everything is computed by the plainest loops, so that it can serve as the definition of the signals.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord

from .made import causal_uniform, record

Parts = dict[tuple[int, int], dict[str, np.ndarray]]
"""(layer, position) to the vectors inside the feed-forward part, by part name."""


def chain_record(
    hidden: np.ndarray,
    *,
    attention: np.ndarray | None = None,
    start: np.ndarray | None = None,
    references: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    parts: Parts | None = None,
    authors: dict[tuple[int, int, int], tuple[int, float]] | None = None,
    neurons: dict[tuple[int, int, int], tuple[int, float]] | None = None,
    entries: int = sig.ENTRIES,
    births: int = sig.BIRTHS,
    **options: Any,
) -> PromptRecord:
    """One prompt's record with every residual signal of the chain.

    Args:
        hidden: States after the blocks, `[layer, pos, dim]`.
        attention: What attention adds, likewise (nothing); the feed-forward part adds the rest.
        start: State before the first block, `[pos, dim]` (zero).
        references: Reference positions, `[layer, reference]` (the first token, and none).
        authors, neurons: `(layer, position, dim)` to expert or neuron and its part.
        **options: Of `made.record`.
    """
    layers, length, _ = hidden.shape
    before = np.concatenate([(np.zeros_like(hidden[0]) if start is None else start)[None], hidden[:-1]])
    attention = np.zeros_like(hidden) if attention is None else attention
    mlp = hidden - before - attention
    references = np.array([[0, -1]] * layers) if references is None else references
    arrays: dict[str, np.ndarray] = {
        "reference_position": references.astype(np.int32),
        "residual_cosine": cosines(hidden, references),
        **_entries(before, attention, mlp, hidden, authors or {}, neurons or {}, entries),
        **_births(before, hidden, mlp, references, parts or {}, births),
    }
    weights = causal_uniform(layers, 2, length) if weights is None else weights
    return record(weights, hidden, **arrays, **options)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two vectors, 0 if one of them is zero."""
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / size) if size else 0.0


def cosines(hidden: np.ndarray, references: np.ndarray) -> np.ndarray:
    """`[layer, reference, pos]`, NaN where there is no reference."""
    out = np.full((*references.shape, hidden.shape[1]), np.nan)
    for layer, pair in enumerate(references):
        for slot, position in enumerate(pair):
            if position >= 0:
                out[layer, slot] = [cosine(state, hidden[layer, position]) for state in hidden[layer]]
    return out


def _entries(
    before: np.ndarray,
    attention: np.ndarray,
    mlp: np.ndarray,
    after: np.ndarray,
    authors: dict[tuple[int, int, int], tuple[int, float]],
    neurons: dict[tuple[int, int, int], tuple[int, float]],
    count: int,
) -> dict[str, np.ndarray]:
    layers = len(after)
    half = count // 2
    out: dict[str, np.ndarray] = {
        name: np.full((layers, count), np.nan)
        for name in ("residual_after", "residual_before", "attention_write", "mlp_write")
    }
    out |= {name: np.full((layers, count), np.nan) for name in ("write_expert_value", "write_neuron_value")}
    out |= {
        name: np.full((layers, count), -1)
        for name in ("residual_after_pos", "residual_after_dim", "write_expert", "write_neuron")
    }
    for layer in range(layers):
        for first, states in ((0, after[layer]), (half, before[layer])):
            order = np.argsort(-np.abs(states).ravel(), kind="stable")[:half]
            for i, flat in enumerate(order, start=first):
                pos, dim = np.unravel_index(flat, states.shape)
                place = (layer, int(pos), int(dim))
                out["residual_after_pos"][layer, i], out["residual_after_dim"][layer, i] = pos, dim
                out["residual_after"][layer, i] = after[place]
                out["residual_before"][layer, i] = before[place]
                out["attention_write"][layer, i] = attention[place]
                out["mlp_write"][layer, i] = mlp[place]
                if abs(mlp[place]) >= max(abs(before[place]), abs(after[place])) / 2:
                    if place in authors:
                        out["write_expert"][layer, i], out["write_expert_value"][layer, i] = authors[place]
                    if place in neurons:
                        out["write_neuron"][layer, i], out["write_neuron_value"][layer, i] = neurons[place]
    return out


def _births(
    before: np.ndarray, after: np.ndarray, mlp: np.ndarray, references: np.ndarray, parts: Parts, count: int
) -> dict[str, np.ndarray]:
    layers, length, _ = after.shape
    found = []
    for layer in range(layers):
        norms = np.linalg.norm(after[layer], axis=-1)
        median = np.sort(norms)[(length - 1) // 2]
        for position in range(length):
            for reference in references[layer]:
                if reference < 0 or position == reference:
                    continue
                now = cosine(after[layer, position], after[layer, reference])
                earlier = cosine(before[layer, position], before[layer, reference])
                large = norms[position] >= sig.BIRTH_NORM_RATIO * median
                if abs(now) > sig.BIRTH_COSINE_AT and large and abs(earlier) <= sig.BIRTH_COSINE_AT:
                    found.append((layer, position, int(reference)))
    found = found[:count]
    out: dict[str, np.ndarray] = {
        "birth_layer": np.full(count, -1),
        "birth_position": np.full(count, -1),
        "birth_reference": np.full(count, -1),
        "birth_cosine": np.full((count, len(sig.PARTS)), np.nan),
        "birth_write_norm": np.full(count, np.nan),
    }
    for i, (layer, position, reference) in enumerate(found):
        out["birth_layer"][i], out["birth_position"][i], out["birth_reference"][i] = (
            layer,
            position,
            reference,
        )
        out["birth_write_norm"][i] = np.linalg.norm(mlp[layer, position])
        mine, other = parts.get((layer, position), {}), parts.get((layer, reference), {})
        for j, part in enumerate(sig.PARTS):
            if part in mine and part in other:
                out["birth_cosine"][i, j] = cosine(mine[part], other[part])
    return out
