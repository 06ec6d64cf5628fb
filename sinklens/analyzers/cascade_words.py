"""What is said of the cascade of experts: roles, units, plain names, sentences and warnings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from sinklens.core.counts import verb

from .expert_routing import Routing
from .spikes import COMMON, Spike, share_written

FIRST, AMPLIFIES, ERASES = "first writer", "amplifies", "erases"
ROUTED = "routed"


UNITS = {
    "share": "share of the entry's peak that this part adds (negative: takes away), mean over prompts",
    "value": "what it adds to the entry, signed, routing weight included, mean over prompts",
    "router_score": "router score on the sink token before the choice",
    "router_score_others": "the same, mean over the other tokens",
    "router_ratio": "ratio of the two",
    "chosen": "share of prompts that route the sink token to the expert",
    "chosen_others": "share of the other tokens routed to it",
    "routing_weight": "mean routing weight of the sink token there",
    "sink_lost": "drop of the sink's share without it / its share beyond even attention (1: down to even attention)",
    "d_sink": "the paper's D_sink without the expert: 1 - mean over heads of attention after over before",
}


LABELS = {
    "first_writer": "first writer",
    "share_written": "share of the peak that the writing steps add up to",
    "sink_lost": "sink lost without it",
    "d_sink": "D_sink without it",
    "largest_sink_lost": "largest part of the sink lost without one expert",
    "largest_sink_lost_by": "without",
    "n_amplifiers": "parts that amplify",
    "n_erasers": "parts that erase",
}


def name_of(row: dict[str, Any]) -> str:
    if row["kind"] == ROUTED:
        return f"L{row['layer']}E{row['expert']}"
    said = {"attention": "attention of block", "block": "block", "dense": "the dense MLP of block"}
    return f"{said.get(row['kind'], 'shared experts of block')} {row['layer']}"


def verdict(spike: Spike, rows: Sequence[dict[str, Any]]) -> str:
    entry = f"dim {spike.dim} of position {spike.position} ({spike.token!r}, peak {spike.peak:.4g})"
    if not any(row["kind"] == ROUTED for row in rows):
        named = ", ".join(name_of(row) for row in rows)
        return f"No routed expert has a large part in {entry}{f'; it comes from {named}' if rows else ''}."

    def said(role: str) -> str:
        return ", ".join(f"{name_of(r)} ({100 * r['share']:+.0f} %)" for r in rows if r["role"] == role)

    first, more, fewer = (said(role) for role in (FIRST, AMPLIFIES, ERASES))
    parts = [f"{first} writes {'first' if more else 'it'}"] if first else []
    parts += [f"{more} {verb(more.count('%'), 'amplifies', 'amplify')}"] if more else []
    parts += [f"{fewer} {verb(fewer.count('%'), 'erases', 'erase')}"] if fewer else []
    return f"On {entry}: {'; '.join(parts)}.{_routing_sentence(rows)}"


def _routing_sentence(rows: Sequence[dict[str, Any]]) -> str:
    """How special the router finds the sink token, for the routed expert that writes most."""
    writers = [
        row for row in rows if row["kind"] == ROUTED and row["share"] > 0 and row["router_score"] is not None
    ]
    if not writers:
        return ""
    top = max(writers, key=lambda row: row["share"])
    if top["router_score_others"] is None:
        return ""
    return (
        f" The router gives {name_of(top)} a score of {top['router_score']:.3g} on the sink token and "
        f"{top['router_score_others']:.3g} on others."
    )


def notes_on(
    spike: Spike, shares: Float[np.ndarray, "prompt layer expert"], routing: Routing, below: bool
) -> list[str]:
    notes = []
    if below:
        notes.append(
            "No entry is massive by the published rule; the one that stands out most is followed instead."
        )
    if np.isnan(routing.score).all():
        notes.append("Router scores were not recorded at this position.")
    if np.isnan(routing.weight).all():
        notes.append(
            "The routing of this position was not kept; only experts looked up at the entry have a share."
        )
    if spike.n_unread:
        every = len(spike.paths) + spike.n_unread
        notes.append(
            f"Read in {len(spike.paths)} of {every} prompts: in the others too many entries are as large as this one."
        )
    if spike.same_sign < 1:
        notes.append("Its sign differs between prompts: values are mean sizes with the sign of most prompts.")
    if share_written(spike) < COMMON:
        notes.append("The entry grows in many small steps; the parts listed write less than half of it.")
    return notes
