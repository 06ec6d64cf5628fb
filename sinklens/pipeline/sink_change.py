"""The sink of a run without and under a change: attention to it, heads above the threshold, how much of it is lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from sinklens.evaluation.effects import decay
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import Trace

from .mitigation_run import sink_map, sink_position
from .run import Run

EPSILON = 0.3
"""Threshold of a sink where the run has no analyzer that says one."""


def sink_of(traced: Trace, base: Run) -> dict[str, Any] | None:
    """The sink of the unchanged model, looked for in a trace, as plain data; None where attention was not recorded.

    Returns:
        `position` and `epsilon`; `map`: attention to it by layer and head, mean over prompts; `share`: its mean;
        `rate`: percent of (prompt, layer, head) above `epsilon`; `later`: the map from later queries alone, known for
        the first position of models without learned sinks, whose own row is 1; None otherwise.
    """
    position = sink_position(base)
    found = sink_map(traced, position)
    if found is None:
        return None
    analyzer = next((one for one in base.analyzers if one.name == "primary-sinks"), None)
    epsilon = float(getattr(analyzer, "epsilon", EPSILON))
    each = np.array(_columns(traced, position))
    later = _later(traced, position)
    return {
        "position": position,
        "epsilon": epsilon,
        "map": found.tolist(),
        "share": float(np.nanmean(found)),
        "rate": 100 * float(np.mean(each[~np.isnan(each)] > epsilon)),
        "later": None if later is None else later.tolist(),
    }


def _columns(traced: Trace, position: int) -> list[Float[np.ndarray, "layer head"]]:
    """Attention to the position, of every prompt that kept it."""
    found = []
    for record in traced:
        at = np.flatnonzero(record[sig.KEPT_POSITIONS] == position)
        if len(at):
            found.append(record[sig.ATTENTION_RECEIVED][:, :, at[0]])
    return found


def _later(traced: Trace, position: int) -> Float[np.ndarray, "layer head"] | None:
    learned = any(sig.LEARNED_SINK_MASS.name in record.arrays for record in traced)
    if position != 0 or learned or sig.VISIBLE_QUERIES not in traced.signals:
        return None
    found = []
    for record in traced:
        at = np.flatnonzero(record[sig.KEPT_POSITIONS] == 0)
        queries = record[sig.VISIBLE_QUERIES][:, :1]
        if len(at) and queries.min() > 1:
            found.append((record[sig.ATTENTION_RECEIVED][:, :, at[0]] * queries - 1) / (queries - 1))
    return np.mean(found, 0) if found else None


def change_of(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """A change of the sink, for documents.

    Returns:
        `position`, `share` and `rate` with what they were before (`share_before`, `rate_before`), the `map`, and
        `lost_by_layer`: 1 minus the mean over heads of the attention's ratio, as of `decay`, None where every head
        is faint; `lost`: its mean over the layers with a head above `epsilon`. Both None where there is no such layer
        or where later queries cannot be told apart. `text` says it in a sentence.
    """
    lost, layers = None, None
    if before["later"] is not None and after["later"] is not None:
        found = decay(np.array(before["later"]), np.array(after["later"])).by_layer
        layers = [None if np.isnan(each) else float(each) for each in found]
        sinking = (np.array(before["map"]) > before["epsilon"]).any(1) & np.isfinite(found)
        lost = float(found[sinking].mean()) if sinking.any() else None
    told = {
        "position": after["position"],
        "share_before": before["share"],
        "share": after["share"],
        "rate_before": before["rate"],
        "rate": after["rate"],
        "lost": lost,
        "lost_by_layer": layers,
        "map": after["map"],
    }
    rates = f"{told['rate_before']:.1f} to {told['rate']:.1f}"
    text = (
        f"Attention to position {told['position']} goes from {told['share_before']:.3f} to {told['share']:.3f}, heads "
        f"above {before['epsilon']:g} from {rates} %"
    )
    return {**told, "text": text + ("." if lost is None else f"; {round(100 * lost)} % of the sink is lost.")}


def mean_sink(draws: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over draws of a control."""

    def mean(name: str) -> Any:
        values = [draw[name] for draw in draws]
        return None if any(value is None for value in values) else np.mean(values, 0).tolist()

    fixed = {key: draws[0][key] for key in ("position", "epsilon")}
    return fixed | {name: mean(name) for name in ("map", "share", "rate", "later")}
