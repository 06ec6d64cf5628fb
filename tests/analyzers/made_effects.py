"""Results of experiments on pictures as the manifest holds them."""

from __future__ import annotations

from typing import Any

import numpy as np

from sinklens.evaluation.paired import mean_interval, paired_difference


def measured(
    name: str, mine: list[float], control: list[float], *, source: str = "visual-sinks", too_few: int = 0
) -> dict[str, Any]:
    """One set of tokens: the same numbers for loss and KL, their opposite for right tokens."""
    a, b = np.array(mine), np.array(control)
    out: dict[str, Any] = {
        "name": name, "label": name, "source": source, "n_prompts": len(mine), "prompts": list(range(len(mine))),
        "removed": 2.0, "too_few": too_few,
    }  # fmt: skip
    for key, sign in (("loss", 1), ("right", -1), ("kl", 1)):
        out[key] = mean_interval(sign * a).to_json()
        out[f"control_{key}"] = mean_interval(sign * b).to_json()
        out[f"difference_{key}"] = paired_difference(sign * a, sign * b).to_json()
    return out


def effects(*sets: dict[str, Any], n: int = 6) -> dict[str, Any]:
    base = mean_interval(np.full(n, 0.5)).to_json()
    return {
        "base": {"loss": base, "right": base},
        "sets": list(sets),
        "draws": 4,
        "seed": 0,
        "n_prompts": n,
        "answered": n,
    }
