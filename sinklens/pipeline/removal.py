"""What happens without the Super Experts: the sink with them removed, and with as many others removed.

Magnitude is not cause. A short second look at the model says whether the experts that were found carry the sink.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from sinklens.analyzers import PrimarySinks
from sinklens.analyzers.super_experts import ROUTED
from sinklens.inputs.spec import Prompt
from sinklens.models.spec import OpenedModel
from sinklens.tracers import signals as sig
from sinklens.tracers.executor import TracePlan, trace
from sinklens.tracers.trace import Trace

PROMPTS = 8
Pairs = frozenset[tuple[int, int]]


def removal_effect(
    opened: OpenedModel, prompts: tuple[Prompt, ...], plan: TracePlan, seen: Trace, rows: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """The sink on the same few prompts with all experts, without the found ones, and without a control.

    The control removes as many other experts of the same layers, drawn with a seed among those that tokens were
    routed to. Removing means that the expert puts out zero; routing weights are not renormalised.

    Returns:
        For each of the three, sink rate (%) and share of the position that was strongest before; None if no routed
        expert was found or none is left to be a control.
    """
    removed: Pairs = frozenset((row["layer"], row["expert"]) for row in rows if row["kind"] == ROUTED)
    control = matched_control(seen, removed)
    if not removed or len(control) < len(removed):
        return None
    few = tuple(prompts[:PROMPTS])
    light = replace(plan, signals=PrimarySinks.needs, own_experts=False)
    with_all = trace(opened, few, light)
    position = PrimarySinks().analyze(with_all).summary.get("strongest_position")
    if position is None:
        return None
    ways = {
        "all experts": with_all,
        "without them": trace(opened, few, replace(light, ablate=removed)),
        "without others": trace(opened, few, replace(light, ablate=control)),
    }
    return {
        "removed": sorted(map(list, removed)),
        "control": sorted(map(list, control)),
        "position": position,
        "n_prompts": len(few),
        "epsilon": PrimarySinks().epsilon,
        **{name.replace(" ", "_"): strength_at(way, position) for name, way in ways.items()},
    }


def matched_control(seen: Trace, removed: Pairs) -> Pairs:
    """As many other experts of the same layers as were removed there, with a fixed seed."""
    routed = np.sum([record[sig.EXPERT_TOKENS].clip(0) for record in seen], axis=0)
    generator = np.random.default_rng(0)
    chosen: set[tuple[int, int]] = set()
    for layer in sorted({layer for layer, _ in removed}):
        gone = [expert for at, expert in removed if at == layer]
        left = [int(e) for e in np.flatnonzero(routed[layer]) if int(e) not in gone]
        take = generator.permutation(left)[: len(gone)]
        chosen |= {(layer, int(expert)) for expert in take}
    return frozenset(chosen)


def strength_at(way: Trace, position: int) -> dict[str, float]:
    """Sink rate (%) and mean share of one position."""
    shares = []
    for record in way:
        at = np.flatnonzero(record[sig.KEPT_POSITIONS] == position)
        if len(at):
            shares.append(record[sig.ATTENTION_RECEIVED][:, :, at[0]])
    alpha = np.stack(shares)
    return {
        "sink_rate": float(100 * (alpha[~np.isnan(alpha)] > PrimarySinks().epsilon).mean()),
        "share": float(np.nanmean(alpha)),
    }
