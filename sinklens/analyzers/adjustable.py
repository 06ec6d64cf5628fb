"""What the thresholds of three analyzers read, for pages in which they can be moved."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sinklens.core.adjustable import Adjustable, Threshold, quoted
from sinklens.tracers import signals as sig
from sinklens.tracers.sink_dims import TAU_ENERGY, SinkRule
from sinklens.tracers.trace import Trace

from .visual import Pictured, sources_of

if TYPE_CHECKING:
    from .massive_activations import MassiveActivations
    from .super_experts import Candidate, SuperExperts

MOST_ENTRIES, MOST_STATES = 30_000, 400_000
"""Entries of the residual stream, and states of visual tokens (tokens by layers), that a page holds."""

_RATIOS = (0.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)


def of_massive(analyzer: MassiveActivations, trace: Trace, otherwise: str) -> Adjustable | None:
    """The strongest entries of every prompt and layer, down to a ratio that leaves few enough of them."""
    held = []
    for place, record in enumerate(trace):
        value, median = record[sig.RESIDUAL_TOP], record[sig.RESIDUAL_MEDIAN][:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.abs(value) / median
        layer, rank = np.nonzero(np.isfinite(value))
        at = {
            "layer": layer,
            "position": record["residual_top_pos"][layer, rank],
            "dim": record["residual_top_dim"][layer, rank],
            "value": value[layer, rank],
            "ratio": np.nan_to_num(ratio[layer, rank], posinf=np.inf),
            "median": np.broadcast_to(median, value.shape)[layer, rank],
            "prompt": np.full(len(layer), place),
        }
        held.append(at)
    joined = {name: np.concatenate([part[name] for part in held]) for name in held[0]}
    if joined["value"].dtype != np.float32:
        return None
    least = next((r for r in _RATIOS if int((joined["ratio"] >= 0.999 * r).sum()) <= MOST_ENTRIES), None)
    if least is None or least > analyzer.relative:
        return None
    kept = joined.pop("ratio") >= 0.999 * least  # the rule multiplies, which may round the other way
    arrays = {name: part[kept] for name, part in joined.items()}
    pieces = [record.pieces for record in trace]
    places = zip(arrays["prompt"].tolist(), arrays["position"].tolist(), strict=True)
    arrays["word"], words = quoted([pieces[prompt][position] for prompt, position in places])
    arrays["length"] = np.array([len(record) for record in trace])
    ranks = trace.records[0][sig.RESIDUAL_TOP].shape[1]
    return Adjustable(
        "massive-activations",
        (
            Threshold("absolute", "|value| above", analyzer.absolute, 0.0),
            Threshold("relative", "times the median", analyzer.relative, least),
        ),
        arrays,
        {"strict": analyzer.recipe == "code", "min_prompts": analyzer.min_prompts, "otherwise": otherwise},
        words,
        analyzer.headline,
        f"The page holds the {ranks} largest entries of each prompt and layer"
        + (f", from {least:g} times the median on." if least else "."),
    )


def of_experts(
    analyzer: SuperExperts,
    candidates: Sequence[Candidate],
    effects: Collection[tuple[list[list[int]], str, str]],
    facts: dict[str, Any],
) -> Adjustable:
    """Every projection that is compared.

    Args:
        effects: Sets of experts that were pruned together, and what is said of it if one, or several, are found.
        facts: `seen, carrier, otherwise, least, kinds`.
    """
    word, words = quoted([c.best.pieces[c.position] for c in candidates])
    arrays = {
        "size": np.array([c.size for c in candidates], np.float64),
        "layer": np.array([c.layer for c in candidates]),
        "expert": np.array([c.expert for c in candidates]),
        "kind": np.array([facts["kinds"].index(c.kind) for c in candidates]),
        "spike": np.array([c.spike for c in candidates]).astype(int),
        "dim": np.array([c.dim for c in candidates]),
        "position": np.array([c.position for c in candidates]),
        "word": word,
    }
    thresholds = [Threshold("percentile", "percentile of all experts", analyzer.percentile, 0.0, 100.0)]
    if analyzer.recipe == "paper":
        thresholds.append(Threshold("fraction", "part of the largest", analyzer.fraction, 0.0, 1.0))
    return Adjustable(
        "super-experts",
        tuple(thresholds),
        arrays,
        {
            **facts,
            "code": analyzer.recipe == "code",
            "formation": analyzer.scope == "formation",
            "floor": analyzer.floor,
            "effects": [list(entry) for entry in effects],
        },
        words,
        analyzer.headline,
        ""
        if len(candidates) >= facts["least"] or analyzer.recipe == "code"
        else f"With {len(candidates)} projections the percentile is not used.",
    )


def of_visual(
    seen: Sequence[Pictured], rule: SinkRule, summary: dict[str, Any], *, code: bool, by_chance: float
) -> Adjustable | None:
    """φ of every visual token in every layer, and the attention it gets; None if there are too many."""
    states = sum(int(item.visual.sum()) * len(item.phi) for item in seen)
    if rule.tau_energy is not None or states > MOST_STATES:
        return None
    phi = [np.nan_to_num(item.phi[:, item.visual].astype(np.float32), nan=0.0) for item in seen]
    known = all(sig.TEXT_RECEIVED.name in item.record.arrays for item in seen)
    received = (
        [np.nan_to_num(item.record[sig.TEXT_RECEIVED][:, item.visual]) for item in seen] if known else []
    )
    energy = 0.0 if all(np.isfinite(item.phi).all() for item in seen) else rule.cut.energy
    size = rule.dims.hidden_size
    return Adjustable(
        "visual-sinks",
        (Threshold("tau", "φ of at least", rule.tau, max(0.001, float(np.sqrt(energy * size)))),),
        {
            "phi": np.concatenate(phi, axis=1),
            "received": np.concatenate(received, axis=1) if known else np.zeros((0, 0), np.float32),
            "prompt": np.repeat(np.arange(len(seen)), [int(item.visual.sum()) for item in seen]),
        },
        {
            "hidden": size,
            "energy": TAU_ENERGY,
            "code": code,
            "pictures": summary["n_pictures"],
            "largest": summary["largest_phi"],
            "largest_layer": summary["largest_phi_layer"],
            "by_chance": summary["largest_by_chance"],
            "beyond": by_chance,
            "where": f"Sink {sources_of(rule.dims)}.",
        },
        note="" if not energy else "Smaller values of φ were not recorded.",
    )
