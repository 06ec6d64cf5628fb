"""What the interventions of a causal verification did, one value per prompt, and how it is reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sinklens.evaluation.paired import mean_interval, paired_difference

QUANTITIES = ("sink_share", "sink_rate", "sink_lost", "d_sink", "d_sink_of_means", "kl", "loss_change")


@dataclass
class Measured:
    """What one intervention did, one entry per prompt in every list; NaN for prompts that lack what is changed."""

    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in QUANTITIES})
    by_layer: list[np.ndarray] = field(default_factory=list)
    left: dict[int, list[dict[str, float]]] = field(default_factory=dict)
    faint: int = 0
    edited: int = 0
    largest: float = 0.0
    output: float = 0.0

    def array(self, name: str) -> np.ndarray:
        return np.array(self.values[name], dtype=np.float64)


def effect_json(found: Measured, base: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What an intervention did, against the values of the unchanged model."""
    by_layer = np.array(found.by_layer)
    return {
        "acted": {"edited": found.edited, "largest_change": found.largest, "output_change": found.output},
        "effect": {name: mean_interval(found.array(name)).to_json() for name in QUANTITIES},
        "change": {
            name: paired_difference(found.array(name), np.array(base[name])).to_json()
            for name in ("sink_share", "sink_rate")
        },
        "d_sink_by_layer": [_plain(mean_known(column)) for column in by_layer.T] if by_layer.size else [],
        "faint_heads": found.faint,
    }


def control_json(what: str, found: Measured, draws: Sequence[Measured]) -> dict[str, Any]:
    """What the draws of a control did on average, and what an intervention does beyond them."""
    pooled = {name: np.mean([draw.array(name) for draw in draws], axis=0) for name in QUANTITIES}
    return {
        "what": what,
        "draws": len(draws),
        "edited": sum(draw.edited for draw in draws),
        "output_change": max(draw.output for draw in draws),
        "effect": {name: mean_interval(pooled[name]).to_json() for name in QUANTITIES},
        # Within each prompt: what the intervention does beyond its control.
        "beyond": {name: paired_difference(found.array(name), pooled[name]).to_json() for name in QUANTITIES},
    }


def left_json(found: Measured) -> dict[str, Any] | None:
    """What is left of the massive entries behind the change, mean over prompts."""
    if not found.left:
        return None
    (layer, rows), *_ = found.left.items()
    return {
        "behind_block": layer,
        **{name: _plain(mean_known(np.array([row[name] for row in rows]))) for name in rows[0]},
    }


def mean_known(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else value
