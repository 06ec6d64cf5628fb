"""Secondary sinks: ordinary tokens that take the primary sink's direction in the middle layers, for a while."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from sinklens.core.errors import UsageError
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord, Trace

from .aligned_tokens import (
    NOISE,
    PAPER_MARGIN,
    PAPER_SHORTEST,
    SECONDARY,
    TOKEN_CLASSES,
    WITH_PRIMARY,
    Aligned,
    Level,
    Primary,
    aligned_tokens,
    find_primary,
    is_aligned,
    norm_correlations,
    sink_levels,
    token_class,
)
from .base import Analyzer, Finding, Reference, Status, registry
from .secondary_figures import Seen, attention_by_layer, draw, tenths
from .secondary_words import LABELS, UNITS, notes_on, tiles, verdict, why_none

WRITTEN_SHARE = 0.5
"""Norm of what the feed-forward part adds over the norm of the state, from which on it is the writer."""


@registry.register("secondary-sinks")
@dataclass(frozen=True)
class SecondarySinks(Analyzer):
    """Tokens that become like the primary sink in the middle of the network and stop being so after some layers.

    How it is computed: the primary sink of a prompt is the position with the largest mean hidden-state norm among
    those whose norm exceeds `norm_ratio` times the median token's on two consecutive layers. It is active from the
    block that raises its norm most to the block that takes most of it away. A token is aligned in a layer if the
    cosine of its state with the primary's exceeds `cosine` in size (either sign) and its norm is at least
    `norm_gate` times the layer's median. Its creation layer is the first aligned layer, its lifetime the number of
    aligned layers; gaps do not count. Noise: up to min(4, P/8) layers, P being the primary's own lifetime. With the
    primary: created within two layers of it, or alive for 3/4 P. Secondary: the rest. A sink level is a pair of
    creation layer and lifetime, neighbours within one layer merged, that holds `level_tokens` tokens. The score is
    the mean attention over aligned layers, heads and other queries. At the creation layer the feed-forward part is
    compared with the primary's own at the same layer: input, gate, up, activation, product and output. It is called
    the writer if the norm of what it adds is at least half of the state's.

    Compared with the paper: cosine, creation layer and lifetime are those of Wong et al. Their bounds are absolute
    (`recipe="paper"`: secondary if 4 < lifetime < layers - 15, tokens after the primary only, no norm gate, the last
    layer left out), so models of 20 layers or fewer have none; the depth-relative bounds of `recipe="relative"`, the
    norm gate, the merging of levels and the score's formula are ours. The authors look at positions 0 and 1 for the
    primary sink; here it may stand anywhere.

    When not to trust it: late in a network all states can share a narrow cone, so that alignment alone means little;
    that is what the norm gate is for. The trace compares with two positions only; layers without a comparison are
    counted and lower lifetimes. Tokens of one prompt are not independent, so read a rank correlation as a description.

    Args:
        recipe: `relative` or `paper`, see above.
        norm_gate: In units of the median norm; 0 switches it off. Not used by `recipe="paper"`.
        level_tokens: Tokens that a sink level must hold.
        min_visible: Other queries that must see a token before its attention is scored.
    """

    recipe: Literal["relative", "paper"] = "relative"
    cosine: float = 0.9
    norm_ratio: float = 10.0
    norm_gate: float = 3.0
    level_tokens: int = 3
    min_visible: int = 16

    name = "secondary-sinks"
    title = "Secondary sinks"
    place = 12
    formula = (
        '<math display="block"><mrow><mo>|</mo><mi>cos</mi><mo>(</mo><msub><mi>h</mi><mrow><mi>l</mi><mo>,</mo>'
        "<mi>t</mi></mrow></msub><mo>,</mo><msub><mi>h</mi><mrow><mi>l</mi><mo>,</mo><mi>p</mi></mrow></msub><mo>)</mo><mo>|</mo>"
        "</mrow><mo>&gt;</mo><mn>0.9</mn><mo>∧</mo><mrow><mo>‖</mo><msub><mi>h</mi><mrow><mi>l</mi><mo>,</mo><mi>t</mi>"
        "</mrow></msub><mo>‖</mo></mrow><mo>≥</mo><mn>3</mn><mo>·</mo><munder><mi>median</mi><mi>s</mi></munder><mrow>"
        "<mo>‖</mo><msub><mi>h</mi><mrow><mi>l</mi><mo>,</mo><mi>s</mi></mrow></msub><mo>‖</mo></mrow></math>"
    )
    needs = frozenset(
        {
            sig.RESIDUAL_COSINE,
            sig.REFERENCE_POSITION,
            sig.RESIDUAL_NORM,
            sig.BIRTH_LAYER,
            sig.BIRTH_POSITION,
            sig.BIRTH_REFERENCE,
            sig.BIRTH_COSINE,
            sig.BIRTH_WRITE_NORM,
            sig.ATTENTION_RECEIVED,
            sig.ATTENTION_RECEIVED_MEAN,
            sig.ATTENTION_SELF,
            sig.KEPT_POSITIONS,
            sig.VISIBLE_QUERIES,
        }
    )
    summarises = (
        "n_secondary", "per_1000_tokens", "n_with_primary", "n_noise", "n_levels", "levels",
        "primary_position", "primary_token", "primary_share_of_prompts", "active_first", "active_last",
        "layers_unknown", "primary_share_alone", "primary_share_beside_secondary", "n_prompts",
        "n_prompts_without_primary", "n_tokens", "norm_score_rho", "norm_score_n", "norm_lifetime_rho",
        "norm_lifetime_n", "births_recorded", "n_written_by_mlp", "median_input_cosine",
        "median_gate_cosine", "median_up_cosine", "median_act_cosine", "median_product_cosine",
        "median_down_cosine", "newline_lift", "punctuation_lift", "digit_lift", "word_lift", "other_lift",
        "position_deciles",
    )  # fmt: skip
    reference = Reference(
        key="wong2025secondary",
        title="On the Existence and Behaviour of Secondary Attention Sinks",
        authors="Jeffrey T. H. Wong and Cheng Zhang and Louis Mahon and Wayne Luk and Anton Isopoussu and Yiren Zhao",
        year=2025,
        arxiv="2512.22213",
        section="definition of secondary sinks and sink levels (Fig. 2); formation by middle-layer MLPs",
    )

    def __post_init__(self) -> None:
        if self.recipe not in ("relative", "paper"):
            raise UsageError(
                f"Unknown recipe {self.recipe!r} of secondary-sinks.", detail="It has: relative, paper."
            )
        if not 0 < self.cosine < 1:
            raise UsageError(f"cosine must lie between 0 and 1, got {self.cosine}.")

    def analyze(self, trace: Trace) -> Finding:
        reason = self._unfit(trace)
        if reason is not None:
            return self.not_applicable(reason)
        paper = self.recipe == "paper"
        found = {record.index: find_primary(record, self.norm_ratio, paper=paper) for record in trace}
        seen = [Seen(r, p, self._tokens(r, p)) for r in trace if isinstance(p := found[r.index], Primary)]
        if not seen:
            return self.not_applicable(why_none(list(found.values()), self.norm_ratio))
        secondary = [token for item in seen for token in item.tokens if token.kind == SECONDARY]
        levels = sink_levels(secondary, self.level_tokens)
        summary = _summary(seen, secondary, levels, len(trace))
        return self.finding(
            Status.FOUND if secondary else Status.NOT_FOUND,
            verdict(secondary, levels, summary),
            rows=_rows(seen),
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=draw(seen, secondary, levels, len(trace.layers)),
            tiles=tiles(secondary, levels, summary),
            notes=notes_on(seen, summary),
        )

    def _unfit(self, trace: Trace) -> str | None:
        """Why the method cannot be used on this model and these prompts."""
        layers = len(trace.layers)
        if not trace.records:
            return "there are no prompts."
        if not any(layer.attention for layer in trace.layers):
            return "the model has no softmax attention."
        if self.needs - trace.signals:
            return "the trace does not compare hidden states with the sink's; profile again to record it."
        if self.recipe == "paper" and layers <= PAPER_MARGIN + PAPER_SHORTEST + 1:
            return (
                f"the paper's bounds ({PAPER_SHORTEST} < lifetime < layers - {PAPER_MARGIN}) leave no lifetime for a "
                f"model of {layers} layers; recipe=relative has bounds that grow with depth."
            )
        return None

    def _tokens(self, record: PromptRecord, primary: Primary) -> list[Aligned]:
        paper = self.recipe == "paper"
        gate = 0.0 if paper else self.norm_gate
        aligned = is_aligned(record, primary, at=self.cosine, norm_gate=gate, later_only=paper)
        return aligned_tokens(record, primary, aligned, paper=paper, min_visible=self.min_visible)


def _rows(seen: Sequence[Seen]) -> list[dict[str, Any]]:
    """Secondary sinks, then tokens that rise with the primary, each strongest first; noise is left out."""
    groups: dict[tuple[str, int, int, int], list[Aligned]] = defaultdict(list)
    for token in (token for item in seen for token in item.tokens if token.kind != NOISE):
        groups[token.kind, token.position, token.token_id, token.creation].append(token)
    rows = [_row(tokens) for tokens in groups.values()]
    order = {SECONDARY: 0, WITH_PRIMARY: 1}
    return sorted(
        rows,
        key=lambda row: (
            order[row["type"]],
            -row["n_prompts"],
            -(row["share"] or 0.0),
            row["creation_layer"],
            row["position"],
        ),
    )


def _row(tokens: list[Aligned]) -> dict[str, Any]:
    """One row for the same token at the same position with the same creation layer, over prompts."""
    first = tokens[0]
    share = _mean([token.write_share for token in tokens])
    return {
        "position": first.position,
        "token": first.piece,
        "creation_layer": first.creation,
        "lifetime": _mean([float(token.lifetime) for token in tokens]),
        "cosine": _mean([token.cosine for token in tokens]),
        "share": _mean([token.score for token in tokens]),
        "type": first.kind,
        "n_prompts": len(tokens),
        "first_prompt": first.prompt,
        "last_aligned_layer": max(token.layers[-1] for token in tokens),
        "write_norm": _mean([token.write_norm for token in tokens]),
        "write_share": share,
        "written_by_mlp": None if share is None else share >= WRITTEN_SHARE,
        **{f"{part}_cosine": _mean([token.parts[i] for token in tokens]) for i, part in enumerate(sig.PARTS)},
    }


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else None


def _summary(
    seen: Sequence[Seen], secondary: Sequence[Aligned], levels: Sequence[Level], n_prompts: int
) -> dict[str, Any]:
    tokens = [token for item in seen for token in item.tokens]
    n_tokens = sum(len(item.record) for item in seen)
    position, at = Counter(item.primary.position for item in seen).most_common(1)[0]
    sample = next(item for item in seen if item.primary.position == position)
    births = [token for token in secondary if not np.isnan(token.write_share)]
    parts = np.abs([token.parts for token in births]) if births else np.full((1, len(sig.PARTS)), np.nan)
    return {
        "n_secondary": len(secondary),
        "per_1000_tokens": 1000 * len(secondary) / n_tokens,
        "n_with_primary": sum(token.kind == WITH_PRIMARY for token in tokens),
        "n_noise": sum(token.kind == NOISE for token in tokens),
        "n_levels": len(levels),
        "levels": [[level.creation, level.lifetime, level.tokens] for level in levels],
        "primary_position": position,
        "primary_token": sample.record.pieces[position],
        "primary_share_of_prompts": at / len(seen),
        "active_first": int(np.median([item.primary.start for item in seen])),
        "active_last": int(np.median([item.primary.end - 1 for item in seen])),
        "layers_unknown": sum(item.primary.unknown for item in seen),
        **_weakening(seen),
        "n_prompts": len(seen),
        "n_prompts_without_primary": n_prompts - len(seen),
        "n_tokens": n_tokens,
        **norm_correlations(secondary),
        "births_recorded": len(births),
        "n_written_by_mlp": sum(token.write_share >= WRITTEN_SHARE for token in births),
        **{f"median_{part}_cosine": _median(parts[:, i]) for i, part in enumerate(sig.PARTS)},
        **_token_classes(seen, secondary),
        "position_deciles": tenths(seen, secondary),
    }


def _weakening(seen: Sequence[Seen]) -> dict[str, float | None]:
    """Attention to the primary sink in the layers in which secondary sinks live, and in its other layers."""
    primary, others = attention_by_layer(seen, len(seen[0].record[sig.RESIDUAL_NORM]))
    alone, shared = primary[np.isnan(others)], primary[~np.isnan(others)]
    return {
        "primary_share_alone": _mean(alone.tolist()),
        "primary_share_beside_secondary": _mean(shared.tolist()),
    }


def _median(values: Float[np.ndarray, " n"]) -> float | None:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else None


def _token_classes(seen: Sequence[Seen], secondary: Sequence[Aligned]) -> dict[str, Any]:
    """For each class of token: how much likelier it is to be a secondary sink than any token; None without any."""
    every = Counter(token_class(piece) for item in seen for piece in item.record.pieces)
    sinks = Counter(token_class(token.piece) for token in secondary)
    rate = len(secondary) / sum(every.values())
    return {
        f"{kind}_lift": sinks[kind] / every[kind] / rate if every[kind] and rate else None
        for kind in TOKEN_CLASSES
    }
