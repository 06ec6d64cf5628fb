"""Hand-made traces: full attention maps and hidden states in, records out, by the plainest code possible."""

from __future__ import annotations

from typing import Any

import numpy as np

from sinklens.models.spec import ModelInfo
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import LayerInfo, PromptRecord, Trace


def causal_uniform(layers: int, heads: int, length: int) -> np.ndarray:
    """Every row spreads its attention evenly over the keys it sees: `[layer, head, query, key]`."""
    rows = np.tril(np.ones((length, length)))
    return np.broadcast_to(rows / rows.sum(1, keepdims=True), (layers, heads, length, length)).copy()


def with_sink(weights: np.ndarray, layer: int, head: int, position: int, share: float) -> np.ndarray:
    """Give a position `share` of every later row of one head; the rest of the row keeps its proportions."""
    block = weights[layer, head]
    rows = np.arange(len(block)) > position
    others = block.copy()
    others[:, position] = 0
    scale = others.sum(1, keepdims=True)
    block[rows] = (others * (1 - share) / np.where(scale == 0, 1, scale))[rows]
    block[rows, position] = share
    return weights


def states(layers: int, length: int, width: int, seed: int = 0) -> np.ndarray:
    """Ordinary hidden states `[layer, pos, dim]`."""
    return np.random.default_rng(seed).normal(size=(layers, length, width))


def record(
    weights: np.ndarray | None = None,
    hidden: np.ndarray | None = None,
    *,
    index: int = 0,
    seen: np.ndarray | None = None,
    ranks: int = 8,
    pieces: list[str] | None = None,
    **extra: np.ndarray,
) -> PromptRecord:
    """One prompt's record from its maps and states. `seen` is the boolean `[query, key]` visibility (causal)."""
    arrays: dict[str, np.ndarray] = dict(extra)
    length = weights.shape[-1] if weights is not None else hidden.shape[1]  # type: ignore[union-attr]
    if weights is not None:
        seen = np.tril(np.ones((length, length), dtype=bool)) if seen is None else seen
        visible = np.broadcast_to(seen.sum(0), (len(weights), length)).astype(np.int32)
        received = weights.sum(2) / visible[:, None]
        bins = np.clip((weights[:, :, 1:, 0] * sig.FIRST_MASS_BINS).astype(int), 0, sig.FIRST_MASS_BINS - 1)
        top1 = np.stack([(weights.argmax(-1) == k).sum(-1) for k in range(length)], -1) / visible[:, None]
        arrays |= {
            "attention_received": received,
            "attention_received_mean": received.mean(1),
            "attention_received_peak": np.nanmax(received, axis=(0, 1)),
            "kept_positions": np.arange(length, dtype=np.int32),
            "visible_queries": visible,
            "attention_self": np.diagonal(weights, axis1=2, axis2=3),
            "attention_top1": top1,
            "first_mass": np.stack([(bins == b).sum(-1) for b in range(sig.FIRST_MASS_BINS)], -1),
        }
    hidden = states(len(weights), length, 11) if hidden is None and weights is not None else hidden
    assert hidden is not None
    arrays |= {"residual_norm": np.linalg.norm(hidden, axis=-1), **largest("residual_top", hidden, ranks)}
    arrays["residual_median"] = np.array([np.sort(np.abs(h).ravel())[(h.size - 1) // 2] for h in hidden])
    names = tuple(pieces or (f"t{i}" for i in range(length)))
    return PromptRecord(index, np.arange(length), names, f"made:{index}", "", arrays)


def largest(name: str, values: np.ndarray, ranks: int) -> dict[str, np.ndarray]:
    """The strongest entries of `[layer, pos, dim]` as a ranked signal."""
    flat = values.reshape(len(values), -1)
    order = np.argsort(-np.abs(flat), axis=1, kind="stable")[:, :ranks]
    pos, dim = np.unravel_index(order, values.shape[1:])
    return {name: np.take_along_axis(flat, order, 1), f"{name}_pos": pos, f"{name}_dim": dim}


def trace(records: list[PromptRecord], *, experts: int = 0, **layer: Any) -> Trace:
    """A trace of records with as many equal layers as they have."""
    n = len(records[0].arrays["residual_norm"])
    kind = {
        "attention": True,
        "down_proj": not experts,
        "experts": bool(experts),
        "shared_expert": False,
        **layer,
    }
    layers = tuple(LayerInfo(i, residual="block output", **kind) for i in range(n))
    heads = (
        records[0].arrays["attention_received"].shape[1] if "attention_received" in records[0].arrays else 1
    )
    info = ModelInfo("example/made", None, "made", n, heads, heads, 11, experts, "float32")
    return Trace(info, layers, records)
