"""Super Experts: the few experts whose down projections write the massive activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from sinklens.core.counts import counted
from sinklens.core.errors import UsageError
from sinklens.core.figures import Figure, Heatmap, Tile
from sinklens.core.papers import SUPER_EXPERTS
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord, Trace

from .adjustable import of_experts
from .base import TRUTH, Analyzer, Finding, Status, registry
from .expert_effects import (
    add_causes,
    carrier_sentence,
    causal_ranking,
    effect_sentence,
    removal,
    stored_effects,
    told_together,
)
from .expert_words import LABELS, UNITS

ROUTED, SHARED, DENSE = "routed", "shared", "dense"
NOT_AN_EXPERT = -1
SMALLEST_FOR_PERCENTILE = 202


@dataclass(frozen=True)
class Candidate:
    """One down projection: a routed expert, a shared expert or the dense MLP of a layer (expert -1).

    Attributes:
        size: The statistic of the recipe: largest |output| over prompts.
        best: The record that holds the largest value.
        spike: Whether the residual entry it writes stands out of its layer, see `SuperExperts.spike_ratio`.
    """

    layer: int
    expert: int
    kind: str
    size: float
    value: float
    position: int
    dim: int
    best: PromptRecord
    n_prompts: int
    routed_tokens: int
    spike: bool


@registry.register("super-experts")
@dataclass(frozen=True)
class SuperExperts(Analyzer):
    """Experts whose down projection puts out values far beyond those of all other experts.

    How it is computed: a(l, e) is the largest |down_proj output| of expert e in layer l over all tokens routed to it
    and all dims, before the routing weight. An expert is a Super Expert if a(l, e) exceeds the `percentile` of all
    experts of the model and `fraction` of their maximum. Experts never routed to have no value. Shared experts and
    the dense MLPs of mixed models take part (expert -1).

    Compared with the paper: the paper's third condition, layers in which massive activations form, has no numeric
    rule; `scope="formation"` asks that the written entry be in the residual at `spike_ratio` times the layer's
    median. `recipe="code"` repeats the official profiler: the first routed row only, zero for unrouted experts,
    0.1 · max with floor division, the first 75 % of the layers; position, dim and signed value stay those of the
    overall maximum. Three guards are ours, so that a model without
    Super Experts gets none: a(l, e) must be at least `floor` times the median expert (0 switches it off); with at
    most 201 experts P99.5 lies between the two largest values and could never name more than one, so there the
    percentile is replaced by the condition of `scope="formation"`.

    When not to trust it: magnitude is not cause. The largest expert may amplify what another one started, or write
    what no head reads; `--verify` prunes the candidates one by one and names the one that carries the sink.
    Values depend on which tokens were routed: use enough prompts.

    Args:
        scope: `all` experts, or only those that write a spike (`formation`).
    """

    percentile: float = 99.5
    fraction: float = 0.1
    floor: float = 5.0
    scope: Literal["all", "formation"] = "all"
    recipe: Literal["paper", "code"] = "paper"
    spike_ratio: float = 50.0
    code_layers: float = 0.75

    name = "super-experts"
    title = "Super Experts"
    place = 30
    headline = True
    formula = (
        '<math display="block"><msub><mi>a</mi><mrow><mi>l</mi><mo>,</mo><mi>e</mi></mrow></msub><mo>=</mo><munder>'
        "<mi>max</mi><mrow><mi>t</mi><mtext>\u00a0routed</mtext><mo>,</mo><mi>j</mi></mrow></munder><mrow><mo>|</mo><msub>"
        "<mi>down_proj</mi><mrow><mi>l</mi><mo>,</mo><mi>e</mi></mrow></msub><msub><mrow><mo>(</mo><mi>t</mi><mo>)</mo>"
        "</mrow><mi>j</mi></msub><mo>|</mo></mrow><mo>,</mo><mspace width='2em'/><msub><mi>a</mi><mrow><mi>l</mi>"
        "<mo>,</mo><mi>e</mi></mrow></msub><mo>&gt;</mo><msub><mi>P</mi><mn>99.5</mn></msub><mo>(</mo><mi>a</mi>"
        "<mo>)</mo><mo>∧</mo><msub><mi>a</mi><mrow><mi>l</mi><mo>,</mo><mi>e</mi></mrow></msub><mo>&gt;</mo>"
        "<mn>0.1</mn><mo>·</mo><mi>max</mi><mspace width='0.2em'/><mi>a</mi></math>"
    )
    needs = frozenset(
        {
            sig.EXPERT_MAX,
            sig.EXPERT_FIRST_ROW,
            sig.EXPERT_TOKENS,
            sig.DOWN_PROJ_TOP,
            sig.RESIDUAL_TOP,
            sig.RESIDUAL_MEDIAN,
            sig.ROUTER_CHOICE,
            sig.ROUTER_WEIGHT,
            sig.KEPT_POSITIONS,
        }
    )
    summarises = (
        "threshold_percentile", "threshold_fraction", "threshold_floor", "percentile_used", "experts_seen",
        "experts", "projections_compared", "largest", "median", "n_prompts", "n_found", "causal_ranking",
        "sink_rate_with_all", "share_with_all", "sink_rate_without_them", "share_without_them",
        "sink_rate_without_others", "share_without_others",
    )  # fmt: skip
    answers = (("percentile_used", TRUTH),)
    reference = SUPER_EXPERTS.at("3, equations 6 to 8")

    def __post_init__(self) -> None:
        if self.recipe not in ("paper", "code"):
            raise UsageError(
                f"Unknown recipe {self.recipe!r} of super-experts.", detail="It has: paper, code."
            )
        if self.scope not in ("all", "formation"):
            raise UsageError(
                f"Unknown scope {self.scope!r} of super-experts.", detail="It has: all, formation."
            )

    def analyze(self, trace: Trace) -> Finding:
        if not any(layer.experts for layer in trace.layers):
            return self.not_applicable(
                f"{trace.info.family} is dense, it has no experts; massive-activations names the layers that write."
            )
        if not trace.records:
            return self.not_applicable("there are no prompts.")
        candidates = self._candidates(trace)
        size = np.array([c.size for c in candidates])
        chosen = self.select(size, np.array([c.spike for c in candidates]))
        order = sorted(range(len(size)), key=lambda i: (-size[i], candidates[i].layer, candidates[i].expert))
        rank = {i: r for r, i in enumerate(order, start=1)}
        rows = [_row(candidates[i], rank[i], trace) for i in order if chosen[i]]
        effects = stored_effects(trace)
        add_causes(rows, effects)
        named = frozenset((row["layer"], row["expert"]) for row in rows if row["kind"] == ROUTED)
        summary = {
            **self._summary(size, order, candidates, trace),
            **removal(effects, named),
            "n_found": len(rows),
            "causal_ranking": causal_ranking(
                effects, {(c.layer, c.expert): c.size for c in candidates if c.kind == ROUTED and c.n_prompts}
            ),
        }
        return self.finding(
            Status.FOUND if rows else Status.NOT_FOUND,
            _verdict(rows, summary),
            rows=rows,
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=_figures(trace, rows),
            tiles=[_tile(rows, summary)],
            notes=self._notes(summary),
            adjustable=lambda: of_experts(self, candidates, told_together(effects), _facts(summary)),
        )

    def select(self, size: Float[np.ndarray, " n"], spike: Bool[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """The rule on the sizes of all candidates; `spike` says whose output stands out in the residual."""
        if not len(size):
            return np.zeros(0, dtype=bool)
        largest = size.max()
        cut = largest // 10 if self.recipe == "code" else self.fraction * largest
        chosen = (size > cut) & (size >= self.floor * np.median(size))
        if len(size) >= SMALLEST_FOR_PERCENTILE or self.recipe == "code":
            chosen &= size > np.percentile(size, self.percentile)
        if self.scope == "formation" or len(size) < SMALLEST_FOR_PERCENTILE:
            chosen &= spike
        return chosen

    def _candidates(self, trace: Trace) -> list[Candidate]:
        layers = trace.layers
        if self.recipe == "code":
            layers = layers[: round(self.code_layers * len(layers))]
        found: list[Candidate] = []
        for layer in layers:
            if layer.experts:
                found += self._routed(trace, layer.index)
            if layer.shared_expert or (layer.down_proj and self.recipe == "paper"):
                kind = SHARED if layer.shared_expert and not layer.down_proj else DENSE
                found.append(self._always_on(trace, layer.index, kind))
        return found

    def _routed(self, trace: Trace, layer: int) -> list[Candidate]:
        values = np.stack([record[sig.EXPERT_MAX][layer] for record in trace])
        statistic = np.abs(values)
        if self.recipe == "code":
            statistic = np.stack([record[sig.EXPERT_FIRST_ROW][layer] for record in trace])
        tokens = np.sum([record[sig.EXPERT_TOKENS][layer] for record in trace], axis=0)
        out = []
        for expert in range(values.shape[1]):
            seen = ~np.isnan(values[:, expert])
            if not seen.any():
                if self.recipe == "code":
                    record = trace.records[0]
                    out.append(Candidate(layer, expert, ROUTED, 0.0, 0.0, 0, 0, record, 0, 0, False))
                continue
            best = int(np.nanargmax(statistic[:, expert]))
            record = trace.records[best]
            position = int(record["expert_max_pos"][layer, expert])
            dim = int(record["expert_max_dim"][layer, expert])
            out.append(
                Candidate(
                    layer,
                    expert,
                    ROUTED,
                    float(statistic[best, expert]),
                    float(values[best, expert]),
                    position,
                    dim,
                    record,
                    int(seen.sum()),
                    int(tokens[expert]),
                    self._is_spike(record, layer, position, dim),
                )
            )
        return out

    def _always_on(self, trace: Trace, layer: int, kind: str) -> Candidate:
        values = np.array([record[sig.DOWN_PROJ_TOP][layer, 0] for record in trace])
        best = int(np.nanargmax(np.abs(values)))
        record = trace.records[best]
        position = int(record["down_proj_top_pos"][layer, 0])
        dim = int(record["down_proj_top_dim"][layer, 0])
        size, tokens = float(abs(values[best])), sum(len(r) for r in trace)
        spike = self._is_spike(record, layer, position, dim)
        return Candidate(
            layer,
            NOT_AN_EXPERT,
            kind,
            size,
            float(values[best]),
            position,
            dim,
            record,
            len(trace),
            tokens,
            spike,
        )

    def _is_spike(self, record: PromptRecord, layer: int, position: int, dim: int) -> bool:
        """Whether the residual after the layer holds the written entry among its strongest, far above the median."""
        at = (record["residual_top_pos"][layer] == position) & (record["residual_top_dim"][layer] == dim)
        value = np.abs(record[sig.RESIDUAL_TOP][layer][at])
        return bool(value.size and value[0] >= self.spike_ratio * record[sig.RESIDUAL_MEDIAN][layer])

    def _summary(
        self, size: Float[np.ndarray, " n"], order: list[int], candidates: list[Candidate], trace: Trace
    ) -> dict[str, Any]:
        routed = trace.records[0][sig.EXPERT_MAX].shape[1] * sum(layer.experts for layer in trace.layers)
        return {
            "threshold_percentile": float(np.percentile(size, self.percentile)),
            "threshold_fraction": float(
                size.max() // 10 if self.recipe == "code" else self.fraction * size.max()
            ),
            "threshold_floor": float(self.floor * np.median(size)),
            "percentile_used": len(size) >= SMALLEST_FOR_PERCENTILE or self.recipe == "code",
            "experts_seen": sum(c.kind == ROUTED and c.n_prompts > 0 for c in candidates),
            "experts": int(routed),
            "projections_compared": len(size),
            "largest": [float(size[i]) for i in order[:10]],
            "median": float(np.median(size)),
            "n_prompts": len(trace),
        }

    def _notes(self, summary: dict[str, Any]) -> list[str]:
        notes = []
        if not summary["percentile_used"]:
            notes.append(
                f"With {summary['projections_compared']} projections P{self.percentile:g} cannot select more than one; "
                f"the condition that the expert writes an entry of {self.spike_ratio:g} times the layer's median "
                "stands in for it."
            )
        missing = summary["experts"] - summary["experts_seen"]
        if missing and self.recipe == "paper":
            have = "has" if missing == 1 else "have"
            notes.append(f"{missing} of {summary['experts']} experts received no token and {have} no value.")
        return notes


def _row(candidate: Candidate, rank: int, trace: Trace) -> dict[str, Any]:
    share, weight = _routing_at(trace, candidate)
    return {
        "layer": candidate.layer,
        "expert": candidate.expert,
        "kind": candidate.kind,
        "abs_max": candidate.size,
        "value": candidate.value,
        "dim": candidate.dim,
        "position": candidate.position,
        "token": candidate.best.pieces[candidate.position],
        "share_of_sink_token": share,
        "routing_weight": weight,
        "n_prompts": candidate.n_prompts,
        "routed_tokens": candidate.routed_tokens,
        "rank": rank,
    }


def _routing_at(trace: Trace, candidate: Candidate) -> tuple[float | None, float | None]:
    """Over the prompts that kept the position: how often its token goes to the expert, and with which weight."""
    if candidate.kind != ROUTED:
        return 1.0, 1.0
    weights = []
    for record in trace:
        if sig.ROUTER_CHOICE.name not in record.arrays:
            return None, None
        at = np.flatnonzero(record[sig.KEPT_POSITIONS] == candidate.position)
        if len(at):
            chosen = record[sig.ROUTER_CHOICE][candidate.layer, at[0]] == candidate.expert
            weights.append(
                float((record[sig.ROUTER_WEIGHT][candidate.layer, at[0]] * chosen).sum())
                if chosen.any()
                else np.nan
            )
    if not weights:
        return None, None
    routed = ~np.isnan(weights)
    return float(routed.mean()), float(np.nanmean(weights)) if routed.any() else 0.0


def _name(row: dict[str, Any]) -> str:
    return f"L{row['layer']}E{row['expert']}" if row["kind"] == ROUTED else f"L{row['layer']} {row['kind']}"


def _verdict(rows: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    compared = f"{summary['experts_seen']} experts that received tokens"
    if not rows:
        ratio = summary["largest"][0] / max(summary["median"], 1e-30)
        return (
            f"No Super Expert among {compared}: the largest output is {ratio:.1f} times the median expert's."
            f"{carrier_sentence(summary)}"
        )
    named = ", ".join(f"{_name(row)} ({row['abs_max']:.4g})" for row in rows[:6])
    more = f" and {len(rows) - 6} more" if len(rows) > 6 else ""
    top = rows[0]
    subject = "it" if len(rows) == 1 else "the strongest"
    return (
        f"{len(rows)} Super Expert{'s' * (len(rows) > 1)} among {summary['experts_seen']} routed experts: "
        f"{named}{more}; {subject} writes dim {top['dim']} on position {top['position']} ({top['token']!r})."
        f"{effect_sentence(summary)}"
    )


def _facts(summary: dict[str, Any]) -> dict[str, Any]:
    """What sentences at other thresholds say too."""
    return {
        "seen": summary["experts_seen"],
        "carrier": carrier_sentence(summary),
        "otherwise": _verdict([], summary),
        "least": SMALLEST_FOR_PERCENTILE,
        "kinds": [ROUTED, SHARED, DENSE],
    }


def _tile(rows: list[dict[str, Any]], summary: dict[str, Any]) -> Tile:
    note = f"of {summary['experts']} experts"
    return Tile("Super Experts", str(len(rows)) if rows else "none", note, link="super-experts")


def _figures(trace: Trace, rows: list[dict[str, Any]]) -> list[Figure]:
    values = np.stack([np.abs(record[sig.EXPERT_MAX]) for record in trace])
    seen = ~np.isnan(values).all(0)
    largest = np.where(seen, np.max(np.nan_to_num(values, nan=0.0), axis=0), np.nan)
    marks = tuple((row["layer"], row["expert"]) for row in rows if row["kind"] == ROUTED)
    return [
        Heatmap(
            "experts",
            "Largest down-projection output by layer and expert",
            f"Maximum over {counted(len(trace), 'prompt')}, routed tokens and dims of |down_proj output|, before "
            "the routing "
            "weight. Rings: Super Experts. Hatched: never routed to, or a layer without experts.",
            largest,
            "abs-max",
            x_label="expert",
            marks=marks,
            log=True,
        )
    ]
