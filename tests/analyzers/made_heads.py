"""Hand-made traces of single heads: full maps, queries, keys and values in; every signal by the plainest code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord

from .made import record

TINY = 1e-300


def softmax_maps(seed: int, layers: int, heads: int, length: int, *, window: int | None = None) -> np.ndarray:
    """Random attention maps `[layer, head, query, key]`, causal or within a window."""
    logits = np.random.default_rng(seed).normal(size=(layers, heads, length, length)) * 2
    seen = visibility(length, window)
    weights = np.where(seen, np.exp(logits), 0)
    return weights / weights.sum(-1, keepdims=True)


def visibility(length: int, window: int | None = None) -> np.ndarray:
    """Boolean `[query, key]`."""
    seen = np.tril(np.ones((length, length), dtype=bool))
    return seen & ~np.tril(np.ones((length, length), dtype=bool), -window) if window else seen


def head_record(
    weights: np.ndarray,
    *,
    domain: str = "",
    references: tuple[int, int] = (0, -1),
    window: int | None = None,
    states: dict[str, np.ndarray] | None = None,
    probes: np.ndarray | None = None,
    logits: np.ndarray | None = None,
    seen: np.ndarray | None = None,
    **more: Any,
) -> PromptRecord:
    """One prompt's record with all signals of single heads.

    Args:
        weights: `[layer, head, query, key]`.
        states: `query [layer, head, pos, dim]`, `key` and `value` `[layer, kv_head, pos, dim]`, and `out
            [layer, head, dim, width]`, the output projection by head.
        probes: Rows of the probe queries.
    """
    length = weights.shape[-1]
    seen = visibility(length, window) if seen is None else seen
    arrays = {
        **_references(weights, references),
        **_entropies(weights, seen),
        **_tail(weights),
        **_rhythm(weights),
        **_prefix(weights, logits, seen),
    }
    if states is not None:
        arrays |= _geometry(states, references)
    if probes is not None:
        count = seen[probes].sum(0)
        total = weights[:, :, probes].sum(2).mean(1)
        arrays["probe_received"] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        arrays["probe_visible"] = np.broadcast_to(count, total.shape).astype(np.int32)
    made = record(weights, seen=seen, **{**more, **arrays})
    return replace(made, domain=domain)


def _references(weights: np.ndarray, references: tuple[int, int]) -> dict[str, np.ndarray]:
    layers, heads, length, _ = weights.shape
    mass = np.zeros((layers, heads, sig.REFERENCES, sig.FIRST_MASS_BINS), dtype=np.int32)
    for layer in range(layers):
        for head in range(heads):
            for slot, position in enumerate(references):
                for query in range(position + 1, length if position >= 0 else 0):
                    share = weights[layer, head, query, position]
                    mass[
                        layer, head, slot, min(int(share * sig.FIRST_MASS_BINS), sig.FIRST_MASS_BINS - 1)
                    ] += 1
    return {"reference_position": np.tile(references, (layers, 1)), "reference_mass": mass}


def entropy(shares: np.ndarray, axis: int = -1) -> np.ndarray:
    return -(shares * np.log(np.maximum(shares, TINY))).sum(axis)


def _entropies(weights: np.ndarray, seen: np.ndarray) -> dict[str, np.ndarray]:
    rows = entropy(weights)
    keys, queries = seen.sum(1), seen.sum(0)
    relative = np.where(keys > 1, rows / np.log(np.maximum(keys, 2)), 0)
    total = weights.sum(2, keepdims=True)
    columns = entropy(weights / np.maximum(total, TINY), 2)
    columns = np.where(queries > 1, columns / np.log(np.maximum(queries, 2)), 0)
    enough = np.where(queries >= min(16, queries.max()), columns, -1)
    return {
        "attention_entropy": rows.mean(-1),
        "attention_entropy_normalised": relative.mean(-1),
        "column_entropy": columns,
        "column_entropy_peak": enough.max(-1),
        "column_entropy_peak_pos": enough.argmax(-1),
    }


def _tail(weights: np.ndarray) -> dict[str, np.ndarray]:
    tail = weights[:, :, -64:].mean(2)
    return {
        "attention_tail": tail,
        "tail_entropy": entropy(tail),
        "tail_peak": tail.max(-1),
        "tail_peak_pos": tail.argmax(-1),
    }


def _geometry(states: dict[str, np.ndarray], references: tuple[int, int]) -> dict[str, np.ndarray]:
    query, key, value, out = (states[name] for name in ("query", "key", "value", "out"))
    group = query.shape[1] // key.shape[1]
    length = query.shape[2]
    unit_q = query / np.linalg.norm(query, axis=-1, keepdims=True)
    unit_k = np.repeat(key / np.linalg.norm(key, axis=-1, keepdims=True), group, axis=1)
    cosine = np.einsum("lhqd,lhkd->lhqk", unit_q, unit_k)
    at = np.full((*cosine.shape[:2], sig.REFERENCES), np.nan)
    for slot, position in enumerate(references):
        if position >= 0:
            at[:, :, slot] = cosine[:, :, position + 1 :, position].mean(-1)
    rest = [k for k in range(length) if k not in references]
    written = np.einsum("lhtd,lhdw->lhtw", np.repeat(value, group, axis=1), out)
    norms = {
        "key_norm": np.linalg.norm(key, axis=-1),
        "value_norm": np.linalg.norm(value, axis=-1),
        "value_out_norm": np.linalg.norm(written, axis=-1),
    }
    means = {f"{name}_mean": norm.mean(-1) for name, norm in norms.items()}
    return {"qk_cosine": at, "qk_cosine_others": cosine[..., rest].mean((2, 3)), **norms, **means}


def _rhythm(weights: np.ndarray) -> dict[str, np.ndarray]:
    """Both variants, over the heads that the maps as they are put into the two groups."""
    without = weights.copy()
    without[..., 0] = 0
    without /= np.maximum(without.sum(-1, keepdims=True), TINY)
    near, far = look_back_groups(weights)
    flat = [maps.reshape(-1, *maps.shape[2:]) for maps in (weights, without)]
    return {
        "local_distance": np.stack([local_distance(maps[near].mean(0)) for maps in flat]),
        "future_influence": np.stack([future_influence(maps[far].mean(0)) for maps in flat]),
    }


def look_back_groups(weights: np.ndarray, share: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (layers first) of the heads that look back least, and of those that look back farthest."""
    length = weights.shape[-1]
    gap = np.arange(length)[:, None] - np.arange(length)
    order = np.argsort((weights * gap).sum(-1).mean(-1).ravel(), kind="stable")
    n = max(int(share * len(order)), 1)
    return order[:n], order[-n:]


def local_distance(near: np.ndarray, cap: int = 10) -> np.ndarray:
    """Mean distance cut at `cap`, per query, of one map."""
    length = len(near)
    return (near * np.minimum(np.arange(length)[:, None] - np.arange(length), cap)).sum(-1)


def future_influence(far: np.ndarray, first: int = 10, last: int = 100) -> np.ndarray:
    """Mean attention from the queries `first` to `last` tokens later, per key, of one map."""
    rows = [far[k + first : k + last + 1, k] for k in range(len(far))]
    return np.array([row.mean() if len(row) else np.nan for row in rows])


def _prefix(weights: np.ndarray, logits: np.ndarray | None, seen: np.ndarray) -> dict[str, np.ndarray]:
    first = weights[:, :, : sig.PREFIX, : sig.PREFIX].mean(1)
    if logits is None:
        return {"prefix_map": first}
    shown = logits[:, :, : sig.PREFIX, : sig.PREFIX].mean(1)
    return {"prefix_map": first, "prefix_logits": np.where(seen[: sig.PREFIX, : sig.PREFIX], shown, np.nan)}
