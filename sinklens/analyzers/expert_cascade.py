"""The cascade of experts on the sink token: which starts its massive activation, which amplify it, which erase it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sinklens.core.counts import counted
from sinklens.core.figures import Figure, Heatmap, Lines, Series
from sinklens.core.papers import SUPER_EXPERTS
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import Trace

from .base import Analyzer, Finding, Status, registry
from .cascade_words import AMPLIFIES, ERASES, FIRST, LABELS, ROUTED, UNITS, name_of, notes_on, verdict
from .expert_routing import Routing, contributions, mean_known, routing_at, usual_neuron
from .massive_activations import MassiveActivations
from .spikes import COMMON, Group, Spike, share_written, trace_spike
from .traced_entries import ATTENTION, BLOCK, SIGNALS
from .writers import standing_out

EFFECTS = ("sink_lost", "d_sink")


@registry.register("expert-cascade")
@dataclass(frozen=True)
class ExpertCascade(Analyzer):
    """Which experts write the sink token's massive activation, layer after layer, and how the router picks them.

    How it is computed: the entry (position, dim) that stands out most is followed through the blocks, as in
    `writers`. What an expert adds to it, routing weight included, is divided by the entry's peak. The first block
    part that adds at least `step` of the peak is the first writer, later ones amplify, and those that take as much
    away erase. Parts that are no routed expert (a dense block, a shared expert, attention) are listed too. Beside each
    expert stand its router score before the choice, on the sink token and on the mean of the other tokens, and how
    often each chooses it.

    Compared with the paper: Su et al. describe Super Experts in successive layers that form massive activations, and
    their router scores on the sink token against others (softmax before the choice). The roles, the threshold `step`
    and the division by the peak are ours. Their ranking is by magnitude before the routing weight; see
    `super-experts`. D_sink is theirs and stands here if the run verified causes. The official code
    contains neither the analysis of the router nor D_sink, so there is one recipe.

    When not to trust it: shares add up along the layers but causes need not: the first writer is often small and
    everything later hangs on it. An expert whose largest output lies elsewhere and which was not looked up at this
    entry has no value (hatched). Router scores exist only where the sink token is the first token or the position
    that receives most attention otherwise.

    Args:
        step: Least share of the peak that makes an expert part of the cascade.
        spike_ratio: Multiple of the layer's median the entry must reach.
        tolerance: As in `writers`.
    """

    step: float = 0.1
    spike_ratio: float = 50.0
    tolerance: float = 0.02

    name = "expert-cascade"
    title = "Cascade of experts"
    place = 35
    formula = (
        '<math display="block"><msub><mi>c</mi><mrow><mi>l</mi><mo>,</mo><mi>e</mi></mrow></msub><mo>=</mo><mfrac>'
        "<mrow><msub><mi>w</mi><mrow><mi>l</mi><mo>,</mo><mi>e</mi></mrow></msub><mo>(</mo><mi>s</mi><mo>)</mo><mo>·</mo><msub>"
        "<mi>down_proj</mi><mrow><mi>l</mi><mo>,</mo><mi>e</mi></mrow></msub><msub><mrow><mo>(</mo><mi>s</mi><mo>)</mo>"
        "</mrow><mi>j</mi></msub></mrow><mrow><munder><mi>max</mi><mi>l</mi></munder><msub><mi>h</mi><mrow><mi>l</mi>"
        "<mo>,</mo><mi>s</mi><mo>,</mo><mi>j</mi></mrow></msub></mrow></mfrac></math>"
    )
    needs = (
        SIGNALS
        | MassiveActivations.needs
        | {
            sig.EXPERT_MAX,
            sig.EXPERT_NEURON,
            sig.ROUTER_CHOICE,
            sig.ROUTER_WEIGHT,
            sig.ROUTER_SCORE,
            sig.ROUTER_SCORE_OTHERS,
            sig.ROUTER_FREQUENCY_OTHERS,
            sig.REFERENCE_POSITION,
            sig.KEPT_POSITIONS,
        }
    )
    summarises = (
        "position", "token", "dim", "peak", "first_writer", "first_layer", "first_expert", "amplifiers",
        "erasers", "n_amplifiers", "n_erasers", "share_written", "largest_sink_lost",
        "largest_sink_lost_by", "n_prompts", "n_experts",
    )  # fmt: skip
    reference = SUPER_EXPERTS.at("4, attention sinks and router scores; the roles in the cascade are ours")

    def analyze(self, trace: Trace) -> Finding:
        if not trace.records:
            return self.not_applicable("there are no prompts.")
        if not any(layer.experts for layer in trace.layers):
            return self.not_applicable(f"{trace.info.family} is dense, it has no experts; see writers.")
        read = {signal.name for signal in (sig.RESIDUAL_AFTER, sig.RESIDUAL_BEFORE, sig.EXPERT_MAX)}
        if any(not read <= record.arrays.keys() for record in trace):
            return self.not_applicable(
                "the trace does not follow entries into the experts; profile again to record it."
            )
        places, below = standing_out(trace, self.spike_ratio)
        spike = self._strongest(trace, places)
        if spike is None:
            return self.not_applicable(
                f"no token has an entry of {self.spike_ratio:g} times its layer's median that could be followed."
            )
        shares = contributions(spike)
        routing = routing_at(trace, spike.position)
        rows = self._rows(trace, spike, shares, routing)
        summary = _summary(trace, spike, rows)
        return self.finding(
            Status.FOUND if any(row["kind"] == ROUTED for row in rows) else Status.NOT_FOUND,
            verdict(spike, rows),
            rows=rows,
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=_figures(spike, shares, routing, rows),
            notes=notes_on(spike, shares, routing, below),
        )

    def _strongest(self, trace: Trace, places: Sequence[tuple[int, int]]) -> Spike | None:
        for place in places:
            spike = trace_spike(trace, place, self.spike_ratio, self.step, self.tolerance)
            if spike is not None:
                return spike
        return None

    def _rows(
        self, trace: Trace, spike: Spike, shares: Float[np.ndarray, "prompt layer expert"], routing: Routing
    ) -> list[dict[str, Any]]:
        """The members of the cascade in order of layer."""
        members = np.abs(np.nan_to_num(mean_known(shares))) >= self.step
        members &= (~np.isnan(shares)).mean(0) >= COMMON
        rows = [
            _expert_row(trace, spike, shares[:, layer, expert], int(layer), int(expert), routing)
            for layer, expert in np.argwhere(members)
        ]
        taken = {row["layer"] for row in rows}
        groups = [*spike.usual(writes=True), *spike.usual(writes=False)]
        rows += [
            _other_row(spike, group, trace)
            for group in groups
            if group.part == ATTENTION or group.layer not in taken
        ]
        rows.sort(key=lambda row: (row["layer"], -abs(row["share"])))
        first = True
        for row in rows:
            row["role"] = ERASES if row["share"] < 0 else FIRST if first else AMPLIFIES
            first = first and row["share"] < 0
        return rows


def _expert_row(
    trace: Trace,
    spike: Spike,
    shares: Float[np.ndarray, " prompt"],
    layer: int,
    expert: int,
    routing: Routing,
) -> dict[str, Any]:
    known = np.flatnonzero(~np.isnan(shares))
    score, others = routing.score[layer, expert], routing.others[layer, expert]
    values = [shares[i] * abs(spike.paths[i].peak) * spike.sign for i in known]
    return {
        **_place(spike, layer),
        "expert": expert,
        "kind": ROUTED,
        "share": float(shares[known].mean()),
        "value": float(np.mean(values)),
        "neuron": usual_neuron(spike, known, layer, expert),
        "router_score": _number(score),
        "router_score_others": _number(others),
        "router_ratio": _number(score / others) if others > 0 else None,
        "chosen": _number(routing.chosen[layer, expert]),
        "chosen_others": _number(routing.chosen_others[layer, expert]),
        "routing_weight": _number(routing.weight[layer, expert]),
        **_effect(trace, layer, expert),
        "n_prompts": int(np.count_nonzero(shares[known])),
    }


def _other_row(spike: Spike, group: Group, trace: Trace) -> dict[str, Any]:
    """A step by something that is no single routed expert."""
    info = trace.layers[group.layer]
    kinds = {ATTENTION: "attention", BLOCK: "block"}
    dense = "shared experts or several" if info.experts else "dense"
    nothing = dict.fromkeys(
        (
            "router_score",
            "router_score_others",
            "router_ratio",
            "chosen",
            "chosen_others",
            "routing_weight",
            *EFFECTS,
        )
    )
    return {
        **_place(spike, group.layer),
        "expert": None,
        "kind": kinds.get(group.part, dense),
        "share": group.share,
        "value": float(
            np.mean([spike.aligned(p) * s.value for s, p in zip(group.steps, group.paths, strict=True)])
        ),
        "neuron": group.neuron,
        **nothing,
        "n_prompts": len(group.steps),
    }


def _place(spike: Spike, layer: int) -> dict[str, Any]:
    return {
        "layer": layer,
        "role": "",
        "position": spike.position,
        "token": spike.token,
        "dim": spike.dim,
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _effect(trace: Trace, layer: int, expert: int) -> dict[str, float | None]:
    """What pruning this expert alone does to the sink, if the run measured it."""
    measured: dict[str, Any] = {}
    effects = trace.manifest.get("experiments", {}).get("effects", {})
    for experiment in effects.get("experiments", []):
        if experiment.get("target", {}).get("experts") == [[layer, expert]]:
            measured = experiment.get("effect", {})
    return {name: measured.get(name, {}).get("mean") for name in EFFECTS}


def _summary(trace: Trace, spike: Spike, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = next((row for row in rows if row["role"] == FIRST), None)
    known = [row for row in rows if row["sink_lost"] is not None]
    causal = max(known, key=lambda row: row["sink_lost"], default=None)
    return {
        "position": spike.position,
        "token": spike.token,
        "dim": spike.dim,
        "peak": spike.peak,
        "first_writer": name_of(first) if first else None,
        "first_layer": first["layer"] if first else None,
        "first_expert": first["expert"] if first else None,
        "amplifiers": [name_of(row) for row in rows if row["role"] == AMPLIFIES],
        "erasers": [name_of(row) for row in rows if row["role"] == ERASES],
        "n_amplifiers": sum(row["role"] == AMPLIFIES for row in rows),
        "n_erasers": sum(row["role"] == ERASES for row in rows),
        "share_written": share_written(spike),
        "largest_sink_lost": causal["sink_lost"] if causal else None,
        "largest_sink_lost_by": name_of(causal) if causal else None,
        "n_prompts": len(spike.paths),
        "n_experts": sum(layer.experts for layer in trace.layers)
        * spike.paths[0].record[sig.EXPERT_MAX].shape[1],
    }


def _figures(
    spike: Spike,
    shares: Float[np.ndarray, "prompt layer expert"],
    routing: Routing,
    rows: Sequence[dict[str, Any]],
) -> list[Figure]:
    ringed = tuple((row["layer"], row["expert"]) for row in rows if row["kind"] == ROUTED)
    where = f"dim {spike.dim} of position {spike.position}"
    part = mean_known(shares)
    x = np.arange(len(part))
    after = mean_known(np.array([path.after for path in spike.paths]))
    figures: list[Figure] = [
        Heatmap(
            "cascade",
            f"What each expert adds to {where}",
            "Share of the entry's peak, routing weight included, mean over "
            f"{counted(len(spike.paths), 'prompt')}; negative: "
            "takes away. Rings: the cascade. Hatched: routed to, but not looked up at this entry, or no experts.",
            part,
            "share of peak",
            x_label="expert",
            marks=ringed,
            limits=(-1.0, 1.0),
        ),
        Lines(
            "value",
            f"{where.capitalize()} through the blocks",
            f"Value after each block, mean over {counted(len(spike.paths), 'prompt')}. A gap: not among the "
            "strongest there.",
            (Series("after the block", x, after, emphasis=True),),
            "layer",
            "value",
            marks=tuple((float(row["layer"]), f"{name_of(row)} {row['role']}") for row in rows)[:4],
        ),
    ]
    if not np.isnan(routing.score).all():
        figures.append(
            Heatmap(
                "router",
                "Router score of the sink token against the others",
                "Score before the choice on the sink token minus the mean over the other tokens, mean over prompts. "
                "Rings: the cascade. Hatched: no experts, or not recorded.",
                routing.score - routing.others,
                "difference of scores",
                x_label="expert",
                marks=ringed,
            )
        )
    return figures
