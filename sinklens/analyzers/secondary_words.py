"""What is said of secondary sinks: units, plain names, sentences, boxes and warnings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sinklens.core.counts import counted, verb
from sinklens.core.figures import Tile
from sinklens.tracers import signals as sig

from .aligned_tokens import NOISE, TOKEN_CLASSES, Aligned, Level, Primary
from .evidence import span
from .secondary_figures import Seen

ALIGNED_OUTPUT = 0.9
"""Median |cosine| from which inputs or outputs are called alike."""


UNITS = {
    "creation_layer": "first layer in which the token is aligned with the primary sink",
    "lifetime": "number of aligned layers",
    "cosine": "cosine with the primary sink's state, signed, mean over aligned layers",
    "share": "share of attention (0-1) from other queries, mean over aligned layers and heads",
    "write_norm": "L2 norm of what the feed-forward part adds at the creation layer",
    "write_share": "the same over the norm of the state after that block",
    **{
        f"{part}_cosine": "cosine with the primary sink's counterpart at the creation layer"
        for part in sig.PARTS
    },
}


LABELS = {
    "n_secondary": "secondary sinks in all prompts",
    "per_1000_tokens": "secondary sinks per 1000 tokens",
    "n_with_primary": "tokens that rise together with the primary sink",
    "n_noise": "tokens aligned too briefly to count",
    "active_first": "primary sink active from layer",
    "active_last": "primary sink active until layer",
    "primary_share_alone": "attention to the primary sink where no secondary sink lives",
    "primary_share_beside_secondary": "where secondary sinks live",
    "layers_unknown": "(prompt, layer) in which the trace did not compare with the primary sink",
    "norm_score_rho": "rank correlation of written norm and attention received",
    "norm_score_n": "tokens in that correlation",
    "norm_lifetime_rho": "rank correlation of written norm and lifetime",
    "norm_lifetime_n": "tokens in that correlation",
    "births_recorded": "secondary sinks whose creation was recorded inside the feed-forward part",
    "n_written_by_mlp": "of these, written by the feed-forward part of their creation layer",
    "written_by_mlp": "written by the MLP",
    "n_levels": "sink levels",
    "levels": "levels as (creation layer, lifetime, tokens)",
    "primary_share_of_prompts": "share of prompts whose primary sink stands there",
    "n_prompts_without_primary": "prompts without a primary sink by norm",
    "position_deciles": "secondary sinks by tenth of the prompt",
    **{f"{part}_cosine": f"{part} cosine" for part in sig.PARTS},
    **{f"median_{part}_cosine": f"median |cosine| at the creation layer: {part}" for part in sig.PARTS},
    **{f"{kind}_lift": f"how much likelier than any token: {kind}" for kind in TOKEN_CLASSES},
}


def why_none(found: Sequence[Primary | str], ratio: float) -> str:
    if "not compared" in found:
        return (
            "the trace did not compare the states with the primary sink's, which is neither the first token nor the "
            "other position that receives most attention."
        )
    return (
        f"no position's hidden state exceeds {ratio:g} times the median norm on two consecutive layers, so there is "
        "no primary sink by norm whose direction others could take."
    )


def verdict(secondary: Sequence[Aligned], levels: Sequence[Level], summary: dict[str, Any]) -> str:
    primary = f"position {summary['primary_position']} ({summary['primary_token']!r})"
    active = span(summary["active_first"], summary["active_last"])
    with_primary = summary["n_with_primary"]
    tokens = f"{counted(with_primary, 'token')} {verb(with_primary, 'rises', 'rise')}"
    if not secondary:
        instead = f" {tokens} together with it instead." if with_primary else ""
        return f"No secondary sink: no token takes the direction of {primary} later than it does.{instead}"
    besides = f" {tokens} together with the primary sink." if with_primary else ""
    n, first, last = len(secondary), min(t.creation for t in secondary), max(t.creation for t in secondary)
    level = f" in {counted(len(levels), 'sink level')}" if levels else ""
    return (
        f"{counted(n, 'secondary sink')} ({summary['per_1000_tokens']:.2g} per 1000 tokens){level}: tokens that "
        f"take the direction of the primary sink, {primary}, from {span(first, last)} on while it is active "
        f"({active}).{_authors(summary)}{besides}"
    )


def _authors(summary: dict[str, Any]) -> str:
    """Whether the feed-forward part of the creation layer wrote them, in a sentence; empty if not recorded."""
    births, written = summary["births_recorded"], summary["n_written_by_mlp"]
    if not births:
        return ""
    before, after = summary["median_input_cosine"], summary["median_down_cosine"]
    cosines = ""
    if before is not None and after is not None and after > ALIGNED_OUTPUT:
        cosines = (
            f"; what it puts out is like the primary's ({after:.2f}), what it is given is not ({before:.2f})"
        )
        cosines = (
            cosines
            if before < ALIGNED_OUTPUT
            else f"; what it is given is like the primary's ({before:.2f}) too"
        )
    return f" The MLP of that layer wrote {written} of {births}{cosines}."


def tiles(secondary: Sequence[Aligned], levels: Sequence[Level], summary: dict[str, Any]) -> list[Tile]:
    if not secondary:
        return []
    note = f"tokens, in {counted(len(levels), 'sink level')}"
    return [
        Tile("Secondary sinks", f"{summary['per_1000_tokens']:.2g} per 1000", note, link="secondary-sinks")
    ]


def notes_on(seen: Sequence[Seen], summary: dict[str, Any]) -> list[str]:
    notes = []
    if summary["n_prompts_without_primary"]:
        notes.append(_left_out(summary["n_prompts_without_primary"]))
    if summary["layers_unknown"]:
        notes.append(
            f"In {summary['layers_unknown']} (prompt, layer) the trace compared with other positions than the primary "
            "sink; they count as not aligned."
        )
    rising = [token for item in seen for token in item.tokens if token.kind != NOISE]
    mixed = sum(token.with_self and not np.isnan(token.score) for token in rising)
    if mixed:
        notes.append(f"The share of {mixed} of {len(rising)} tokens includes their attention to themselves.")
    if summary["births_recorded"] < summary["n_secondary"]:
        missing = summary["n_secondary"] - summary["births_recorded"]
        notes.append(
            f"For {missing} of {summary['n_secondary']} secondary sinks the writing layer was not recorded."
        )
    return notes


def _left_out(n: int) -> str:
    has, was = verb(n, "has", "have"), verb(n, "was", "were")
    return f"{counted(n, 'prompt')} {has} no primary sink by norm and {was} left out."
