"""Every signal of the attention seam of one prompt, recomputed naively in numpy from full maps and vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sinklens.models.spec import OpenedModel
from sinklens.tracers.attention import AttentionTap, ignore, no_statistics
from sinklens.tracers.batch import Batch, forward
from sinklens.tracers.executor import sites
from sinklens.tracers.record_reading import probe_positions

NAN = float("nan")


@dataclass
class Layer:
    """One block and one prompt: A `[head, query, key]`, who sees whom, logits, q k v by head; real tokens only."""

    A: np.ndarray
    seen: np.ndarray
    logits: np.ndarray | None = None
    q: np.ndarray | None = None
    k: np.ndarray | None = None
    v: np.ndarray | None = None
    project: nn.Module | None = None
    group: int = 1
    """Query heads that share a key head."""


def captured(model: OpenedModel, batch: Batch) -> list[Any]:
    """The attention calls of one pass, in order of block."""
    calls: list[Any] = []

    def keep(site: Any, call: Any) -> Any:
        calls.append(call)
        return no_statistics(site, call)

    tap = AttentionTap(sites(model.module, model.anatomy.main, "attention"), keep, ignore)
    with tap.attached(model.module):
        forward(model.module, batch)
    return calls


def eager_maps(model: OpenedModel, batch: Batch) -> list[np.ndarray]:
    """The model's own attention weights `[batch, head, query, key]`, by its eager implementation."""
    before = model.module.config._attn_implementation  # pyright: ignore[reportAttributeAccessIssue]
    model.module.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad():
        maps = model.module(**batch.inputs, output_attentions=True).attentions
    model.module.set_attn_implementation(before)  # type: ignore[operator]
    return [m.double().numpy() for m in maps]


def layers_of(model: OpenedModel, batch: Batch, row: int) -> list[Layer]:
    """What the oracle needs of one prompt."""
    places = np.flatnonzero(batch.valid[row].numpy()) if batch.valid is not None else slice(None)
    found = []
    blocks = model.anatomy.main.blocks
    for block, whole, call in zip(blocks, eager_maps(model, batch), captured(model, batch), strict=True):
        A = whole[row][:, places][:, :, places]
        q, k, v = (x[row].double().numpy()[:, places] for x in (call.query, call.key, call.value))
        group = len(q) // len(k)
        k, v = (np.repeat(x, group, 0) for x in (k, v))
        logits = np.einsum("hqd,hkd->hqk", q, k) * call.scale
        if call.softcap is not None:
            logits = call.softcap * np.tanh(logits / call.softcap)
        project = model.module.get_submodule(block.attention_output)  # type: ignore[arg-type]
        found.append(Layer(A, (A > 0).any(0), logits, q, k, v, project, group))
    return found


def naive(layers: list[Layer], min_visible: int = 16) -> dict[str, np.ndarray]:
    """All signals by name, with `pos` in place of `kept`."""
    n = layers[0].A.shape[-1]
    out: dict[str, list[Any]] = {}

    def put(name: str, value: Any) -> None:
        out.setdefault(name, []).append(value)

    total, most_seen = np.zeros(n), np.zeros(n)
    for layer in layers:
        A, seen = layer.A, layer.seen
        counts = seen.sum(0)
        refs = [0, leader(total, most_seen, min_visible)]
        put("reference_position", refs)
        put("reference_mass", [[histogram(A[h], p) for p in refs] for h in range(len(A))])
        put("attention_entropy_normalised", row_entropy(A, seen).mean(-1))
        columns = np.array([[column_entropy(A[h, :, k], counts[k]) for k in range(n)] for h in range(len(A))])
        put("column_entropy", columns)
        put("column_entropy_peak", np.nanmax(columns[:, counts >= min(min_visible, counts.max())], -1))
        tail = A[:, -64:].mean(1)
        put("attention_tail", tail)
        put("tail_entropy", [-sum(x * np.log(x) for x in m if x > 0) for m in tail])
        put("tail_peak", tail.max(-1))
        put("tail_peak_pos", tail.argmax(-1))
        put("prefix_map", square(A[:, :16, :16].mean(0), ~seen))
        probes = probe_positions(n).numpy()
        sees = seen[probes].sum(0)
        put("probe_visible", sees)
        given = A[:, probes].sum(1).mean(0)
        put("probe_received", [g / c if c else NAN for g, c in zip(given, sees, strict=True)])
        if layer.q is not None:
            for name, value in vectors(layer, refs).items():
                put(name, value)
        total, most_seen = total + A.sum(1).mean(0) / counts, np.maximum(most_seen, counts)
    found = {name: np.array(values) for name, values in out.items()}
    return {**found, **reading(layers)}


def leader(total: np.ndarray, most_seen: np.ndarray, min_visible: int) -> int:
    if not most_seen.any():
        return -1
    enough = [k for k in range(1, len(total)) if most_seen[k] >= min(min_visible, most_seen.max())]
    return max(enough, key=lambda k: total[k], default=-1)


def histogram(A: np.ndarray, place: int) -> list[int]:
    if place < 0:
        return [-1] * 20
    counts = [0] * 20
    for mass in A[place + 1 :, place]:
        counts[min(19, int(mass * 20))] += 1
    return counts


def row_entropy(A: np.ndarray, seen: np.ndarray) -> np.ndarray:
    entropy = -np.where(A > 0, A * np.log(np.where(A > 0, A, 1)), 0).sum(-1)
    keys = seen.sum(-1)
    return np.where(keys > 1, entropy / np.log(np.maximum(keys, 2)), 0.0)


def column_entropy(column: np.ndarray, count: int) -> float:
    if count < 2:
        return 0.0
    p = column / column.sum()
    p = p[p > 0]
    return float(-(p * np.log(p)).sum() / np.log(count))


def square(values: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Padded with NaN to 16 x 16; all NaN where attention looks ahead."""
    found = np.full((16, 16), NAN)
    m = len(values)
    if not (~hidden & np.triu(np.ones(hidden.shape, bool), 1))[:m].any():
        found[:m, :m] = values
    return found


def vectors(layer: Layer, refs: list[int]) -> dict[str, Any]:
    q, k, v, A = layer.q, layer.k, layer.v, layer.A
    assert q is not None
    assert k is not None
    assert v is not None
    assert layer.logits is not None
    n = A.shape[-1]
    cos = np.einsum("hqd,hkd->hqk", q, k)
    cos /= np.linalg.norm(q, axis=-1)[:, :, None] * np.linalg.norm(k, axis=-1)[:, None]
    hidden = ~layer.seen
    logits = np.where(hidden[:16, :16], NAN, layer.logits[:, :16, :16].mean(0))
    others = [k for k in range(n) if k not in refs]
    return {
        "qk_cosine": [[c[p + 1 :, p].mean() if 0 <= p < n - 1 else NAN for p in refs] for c in cos],
        "qk_cosine_others": [c[:, others].mean() for c in cos],
        "key_norm": (norms := np.linalg.norm(k[:: layer.group], axis=-1)),
        "key_norm_mean": norms.mean(-1),
        "prefix_logits": square(logits, hidden),
        "value_out_norm": (out := projected(layer, v)),
        "value_out_norm_mean": out.mean(-1),
        "head_output_norm": projected(layer, A @ v).mean(-1),
    }


def projected(layer: Layer, x: np.ndarray) -> np.ndarray:
    """|x W_O| by running the module on inputs that are zero but for one head, less what it gives for zeros."""
    heads, n, d = x.shape
    found = np.zeros((heads, n))
    if layer.project is None:
        return found
    with torch.no_grad():
        for h in range(heads):
            given = torch.zeros(n, heads * d)
            nothing = layer.project(given)
            given[:, h * d : (h + 1) * d] = torch.as_tensor(x[h])
            found[h] = np.linalg.norm((layer.project(given) - nothing).double().numpy(), axis=-1)
    return found


def reading(layers: list[Layer]) -> dict[str, np.ndarray]:
    """WAAD and FAI with and without the first token, straight from their definitions."""
    heads = [A for layer in layers for A in layer.A]
    n = heads[0].shape[0]
    back = np.arange(n)[:, None] - np.arange(n)
    order = sorted(range(len(heads)), key=lambda i: (heads[i] * back).sum(-1).mean())
    count = max(1, round(0.3 * len(heads)))
    local, remote = ([heads[i] for i in part] for part in (order[:count], order[-count:]))
    near = [np.mean([(A * np.minimum(back, 10)).sum(-1) for A in local], 0)]
    near.append(
        np.array(
            [NAN]
            + [np.mean([(rest(A)[t] * np.minimum(back[t], 10)).sum() for A in local]) for t in range(1, n)]
        )
    )
    influence = [[], []]
    for s in range(n):
        after = slice(s + 10, s + 101)
        influence[0].append(np.mean([A[after, s] for A in remote]) if s + 10 < n else NAN)
        without = [
            np.average(rest(A)[after, s], weights=w) for A in remote if (w := parts(A)[after]).sum() > 0.01
        ]
        influence[1].append(np.mean(without) if without and s else NAN)
    return {"local_distance": np.array(near), "future_influence": np.array(influence)}


def rest(A: np.ndarray) -> np.ndarray:
    """Without the first token's column, rows divided by what is not on it."""
    left = 1.0 - A[:, :1]
    return np.where(np.arange(len(A)) == 0, 0.0, A / np.where(left > 1e-12, left, np.inf))


def parts(A: np.ndarray) -> np.ndarray:
    """How much each row counts without the first token: not at all where it leaves 1e-4, in full at twice that."""
    return np.clip((1.0 - A[:, 0]) / 1e-4 - 1, 0, 1)
