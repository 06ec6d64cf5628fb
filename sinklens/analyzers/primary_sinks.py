"""Primary attention sinks: Sink^epsilon with the position found, not assumed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from sinklens.core.errors import UsageError
from sinklens.core.figures import Figure, Heatmap, Lines, Samples, Series, Tile
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord, Trace

from .base import Analyzer, Finding, Reference, Status, registry
from .evidence import SinkEvidence, gather, norm_sinks, span


@registry.register("primary-sinks")
@dataclass(frozen=True)
class PrimarySinks(Analyzer):
    """Key positions that many heads attend to far beyond their share.

    How it is computed: for every prompt, layer and head, alpha_k is the mean attention that key k receives from the
    queries that see it. Per prompt, layer and head it is compared with epsilon (strictly greater); only then are
    the comparisons averaged: that is the sink rate of position k, in percent. A position is a sink of a prompt if
    its rate there is at least `min_rate` and its mean share is at least `min_lift` times what uniform attention
    would give it. It becomes a row if that holds in `min_prompts` of the prompts long enough to have it. Sinks by
    hidden-state norm are found separately and compared.

    Compared with the paper: Gu et al. report the rate of the first position at 64 tokens; here every position seen
    by at least `min_visible` queries is examined, so that a late column with two queries cannot pass for a sink.
    `recipe="code"` divides by T - k as the official code does; that differs from the number of queries that
    see the key under sliding windows. The rule that turns rates into a list of positions is ours.

    When not to trust it: uniform attention alone gives the first position (H_T / T), so rates at different lengths
    are not comparable, and short prompts make every rate look high: read the lift. Heads that are dormant on some
    queries and active on others can stay below epsilon on average; see `dormant_heads`. With a repeated token all
    positions share the mass and the rate of each collapses although the phenomenon is there.

    Args:
        epsilon: The paper's epsilon.
        recipe: `paper` or `code`, see above.
        exclude_diagonal: Leave out a position's attention to itself.
    """

    epsilon: float = 0.3
    recipe: Literal["paper", "code"] = "paper"
    exclude_diagonal: bool = False
    min_rate: float = 0.1
    min_lift: float = 2.0
    min_prompts: float = 0.1
    min_visible: int = 16
    min_tokens: int = 32
    norm_ratio: float = 10.0

    name = "primary-sinks"
    title = "Primary sinks"
    place = 10
    formula = "Sink_k = 100 · mean over prompts, layers, heads of [ (Σ_q A[q,k]) / n_vis(k) > ε ]"
    needs = frozenset(
        {
            sig.ATTENTION_RECEIVED,
            sig.ATTENTION_RECEIVED_MEAN,
            sig.KEPT_POSITIONS,
            sig.VISIBLE_QUERIES,
            sig.ATTENTION_SELF,
            sig.ATTENTION_TOP1,
            sig.ATTENTION_ENTROPY,
            sig.FIRST_MASS,
            sig.LEARNED_SINK_MASS,
            sig.RESIDUAL_NORM,
        }
    )
    reference = Reference(
        key="gu2024when",
        title="When Attention Sink Emerges in Language Models: An Empirical View",
        authors="Xiangming Gu and Tianyu Pang and Chao Du and Qian Liu and Fengzhuo Zhang and Cunxiao Du and Ye Wang and Min Lin",
        year=2025,
        arxiv="2410.10781",
        section="3, attention sink metric",
        code="https://github.com/sail-sg/Attention-Sink",
        venue="International Conference on Learning Representations",
    )

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1:
            raise UsageError(f"epsilon must lie between 0 and 1, got {self.epsilon}.")
        if self.recipe not in ("paper", "code"):
            raise UsageError(
                f"Unknown recipe {self.recipe!r} of primary-sinks.", detail="It has: paper, code."
            )

    def analyze(self, trace: Trace) -> Finding:
        if not any(layer.attention for layer in trace.layers):
            return self.not_applicable("the model has no softmax attention.")
        records = [record for record in trace if len(record) >= self.min_tokens]
        if not records:
            longest = max((len(record) for record in trace), default=0)
            return self.not_applicable(
                f"sink rates need prompts of at least {self.min_tokens} tokens; the longest has {longest}."
            )
        evidence = [
            gather(r, code_divisor=self.recipe == "code", exclude_diagonal=self.exclude_diagonal)
            for r in records
        ]
        positions = self._sink_positions(evidence)
        rows = [self._row(trace, evidence, position) for position in positions]
        rows.sort(key=lambda row: (-row["rate"], -row["share"], row["position"]))
        strongest = rows[0]["position"] if rows else _most_attended(evidence)
        summary = self._summary(trace, evidence, strongest, rows)
        return self.finding(
            Status.FOUND if rows else Status.NOT_FOUND,
            _verdict(rows, summary),
            rows=rows,
            summary=summary,
            units=UNITS,
            figures=_figures(evidence, strongest, self.epsilon, trace),
            tiles=_tiles(rows, summary),
            notes=self._notes(trace, evidence, summary),
        )

    def _sink_positions(self, evidence: list[SinkEvidence]) -> list[int]:
        """Positions that are sinks in enough of the prompts that have them."""
        hits: Counter[int] = Counter()
        holders: Counter[int] = Counter()
        for item in evidence:
            is_sink = (item.rate(self.epsilon) >= self.min_rate) & (
                item.share >= self.min_lift * item.uniform
            )
            is_sink &= item.visible >= self.min_visible
            hits.update(item.positions[is_sink].tolist())
            holders.update(range(item.length))
        return sorted(k for k, n in hits.items() if n >= max(1.0, self.min_prompts * holders[k]))

    def _row(self, trace: Trace, evidence: list[SinkEvidence], position: int) -> dict[str, Any]:
        at = [item.at(position) for item in evidence if position in item.positions]
        alpha = np.stack([column.alpha for column in at])
        share = float(np.mean([np.nanmean(column.alpha) for column in at]))
        heads = _heads(alpha, self.epsilon)
        layers = sorted({layer for layer, *_ in heads})
        token, token_id, same = _common_token([item.record for item in evidence], position)
        return {
            "position": position,
            "token": token,
            "token_id": token_id,
            "share": share,
            "lift": share / float(np.mean([column.uniform for column in at])),
            "rate": _rate(alpha, self.epsilon),
            "n_prompts": sum(bool(_rate(column.alpha, self.epsilon) >= 100 * self.min_rate) for column in at),
            "first_layer": layers[0] if layers else None,
            "last_layer": layers[-1] if layers else None,
            "n_heads": len(heads),
            "top1_share": float(np.mean([np.nanmean(column.top1) for column in at])),
            "same_token_share": same,
        }

    def _summary(
        self, trace: Trace, evidence: list[SinkEvidence], strongest: int, rows: list[dict[str, Any]]
    ) -> dict[str, Any]:
        alpha = _column(evidence, strongest)
        lengths = [item.length for item in evidence]
        norm = norm_sinks([item.record for item in evidence], self.norm_ratio)
        by_attention = {row["position"] for row in rows}
        dormant = _dormant_heads([item.record for item in evidence]) if strongest == 0 else []
        learned = [
            np.nanmean(r.arrays[sig.LEARNED_SINK_MASS.name])
            for r in trace
            if sig.LEARNED_SINK_MASS.name in r.arrays
        ]
        low, high = _interval(np.nanmean(alpha > self.epsilon, axis=(1, 2)) * 100)
        return {
            "sink_rate": _rate(alpha, self.epsilon),
            "sink_rate_ci_low": low,
            "sink_rate_ci_high": high,
            "strongest_position": strongest,
            "share": float(np.nanmean(alpha)),
            "uniform_share": float(np.mean([item.uniform_at(strongest) for item in evidence])),
            "epsilon": self.epsilon,
            "seq_len": int(np.median(lengths)),
            "seq_len_min": min(lengths),
            "seq_len_max": max(lengths),
            "n_prompts": len(evidence),
            "heads": [[layer, head, rate] for layer, head, rate, _ in _heads(alpha, self.epsilon)],
            "dormant_heads": dormant,
            "learned_sink_mass": float(np.mean(learned)) if learned else None,
            "norm_sink_positions": sorted(norm),
            "agree": sorted(by_attention & norm),
            "attention_only": sorted(by_attention - norm),
            "norm_only": sorted(norm - by_attention),
        }

    def _notes(self, trace: Trace, evidence: list[SinkEvidence], summary: dict[str, Any]) -> list[str]:
        notes = []
        if len({item.length for item in evidence}) > 1:
            notes.append(
                "The prompts differ in length, and sink rates depend on length; fix it with --seq-len."
            )
        skipped = len(trace) - len(evidence)
        if skipped:
            notes.append(f"{skipped} prompts shorter than {self.min_tokens} tokens were left out.")
        # A position that was not kept has a mean share of at most the smallest kept one; only if that times the
        # heads could still reach the rule may a sink have been missed.
        if any(item.smallest_kept > self.epsilon * self.min_rate for item in evidence):
            notes.append("Some prompts have more strong positions than were kept; raise --keep-positions.")
        if summary["norm_only"]:
            notes.append(
                f"Positions {summary['norm_only']} have sink-like hidden-state norms but attract no attention."
            )
        if summary["learned_sink_mass"] is not None:
            notes.append(
                f"The model has learned sink logits that take {summary['learned_sink_mass']:.1%} of all attention; "
                "rows are not renormalised."
            )
        return notes


UNITS = {
    "share": "share of attention (0-1), mean over prompts, layers and heads",
    "lift": "ratio to uniform attention",
    "rate": "% of (prompt, layer, head) with share > epsilon",
    "top1_share": "share of queries whose largest weight is here",
    "same_token_share": "share of prompts with this token at this position",
}


def _rate(alpha: Float[np.ndarray, "*prompt layer head"], epsilon: float) -> float:
    """Sink^epsilon in percent: threshold first, then average; layers without attention have no vote."""
    known = ~np.isnan(alpha)
    return float(100 * (alpha[known] > epsilon).mean()) if known.any() else 0.0


def _heads(
    alpha: Float[np.ndarray, "prompt layer head"], epsilon: float
) -> list[tuple[int, int, float, float]]:
    """Heads above epsilon on at least half of the prompts: layer, head, their rate (0-1) and mean share."""
    rate = (alpha > epsilon).mean(0)
    share = alpha.mean(0)
    return [(int(i), int(j), float(rate[i, j]), float(share[i, j])) for i, j in np.argwhere(rate >= 0.5)]


def _column(evidence: list[SinkEvidence], position: int) -> Float[np.ndarray, "prompt layer head"]:
    return np.stack([item.at(position).alpha for item in evidence if position in item.positions])


def _most_attended(evidence: list[SinkEvidence]) -> int:
    """Where no position is a sink: the one with the largest mean lift among those every prompt kept."""
    common = sorted(set.intersection(*(set(item.positions.tolist()) for item in evidence)))
    lift = [np.mean([item.at(k).share / item.uniform_at(k) for item in evidence]) for k in common]
    return common[int(np.argmax(lift))]


def _common_token(records: list[PromptRecord], position: int) -> tuple[str, int, float]:
    holders = [record for record in records if position < len(record)]
    counts = Counter((record.pieces[position], int(record.token_ids[position])) for record in holders)
    (token, token_id), n = counts.most_common(1)[0]
    return token, token_id, n / len(holders)


def _dormant_heads(records: list[PromptRecord]) -> list[list[float]]:
    """Heads that give the first token more than half of their mass on at least a quarter of the queries."""
    if any(sig.FIRST_MASS.name not in record.arrays for record in records):
        return []
    counts: Int[np.ndarray, "layer head bin"] = np.sum([r[sig.FIRST_MASS].clip(0) for r in records], axis=0)
    upper = counts[:, :, sig.FIRST_MASS_BINS // 2 :].sum(-1) / counts.sum(-1).clip(1)
    return [[int(i), int(j), float(upper[i, j])] for i, j in np.argwhere(upper >= 0.25)]


def _interval(per_prompt: Float[np.ndarray, " prompt"]) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of the mean over prompts, seeded; None for fewer than two prompts."""
    if len(per_prompt) < 2:
        return None, None
    draws = np.random.default_rng(0).choice(per_prompt, (2000, len(per_prompt))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def _verdict(rows: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    if not rows:
        return (
            f"No attention sink: the most attended position, {summary['strongest_position']}, gets "
            f"{summary['share']:.3f} of the attention against {summary['uniform_share']:.3f} if it were uniform."
        )
    top = rows[0]
    others = f" {len(rows) - 1} other positions are sinks too." if len(rows) > 1 else ""
    layers = span(top["first_layer"], top["last_layer"]) if top["n_heads"] else "no layer consistently"
    return (
        f"Attention sink on position {top['position']} ({top['token']!r}): {top['share']:.3f} of the attention, "
        f"{top['lift']:.1f} times uniform; {top['rate']:.1f} % of heads above {summary['epsilon']:g}, {layers}.{others}"
    )


def _tiles(rows: list[dict[str, Any]], summary: dict[str, Any]) -> list[Tile]:
    top = rows[0] if rows else None
    where = f"position {top['position']} · {top['token']}" if top else "no position qualifies"
    protocol = f"ε = {summary['epsilon']:g}, T = {summary['seq_len']}"
    return [
        Tile("Sink rate", f"{summary['sink_rate']:.1f} %", protocol, link="primary-sinks"),
        Tile(
            "Attention to it",
            f"{summary['share']:.3f}",
            f"uniform {summary['uniform_share']:.3f}",
            link="primary-sinks",
        ),
        Tile(
            "Where",
            where if top else "none",
            f"from layer {top['first_layer']}" if top else where,
            link="primary-sinks",
        ),
    ]


def _figures(evidence: list[SinkEvidence], strongest: int, epsilon: float, trace: Trace) -> list[Figure]:
    alpha = _column(evidence, strongest)
    heads = tuple((layer, head) for layer, head, *_ in _heads(alpha, epsilon))
    where = f"position {strongest}"
    figures: list[Figure] = [
        Heatmap(
            "received",
            f"Attention received by {where}",
            f"Mean over {len(alpha)} prompts of the mean attention from all queries that see {where} "
            f"(diagonal included). Rings: above {epsilon:g} on at least half of the prompts.",
            alpha.mean(0),
            "share",
            marks=heads,
            limits=(0.0, 1.0),
        ),
        Samples(
            "rate",
            f"Sink rate of {where} by threshold",
            "Share of (prompt, layer, head) whose mean attention to the position exceeds the threshold.",
            alpha.astype(np.float32),
            epsilon,
        ),
        _profile(evidence),
    ]
    if strongest == 0 and all(sig.FIRST_MASS.name in item.record.arrays for item in evidence):
        counts = np.sum([item.record[sig.FIRST_MASS].clip(0) for item in evidence], axis=0)
        upper = counts[:, :, sig.FIRST_MASS_BINS // 2 :].sum(-1) / counts.sum(-1).clip(1)
        figures.append(
            Heatmap(
                "dormancy",
                "Queries that give the first token more than half of their attention",
                "Share of all queries after the first, over all prompts. A head can be dormant on some queries and "
                "active on others; its mean alone would hide that.",
                np.where(np.isnan(alpha.mean(0)), np.nan, upper),
                "share of queries",
                limits=(0.0, 1.0),
            )
        )
    return figures


def _profile(evidence: list[SinkEvidence]) -> Lines:
    """Mean attention received by position against the uniform baseline, over the prompts that have it."""
    length = max(item.length for item in evidence)
    shown = min(length, 64)
    total, uniform, n = np.zeros(shown), np.zeros(shown), np.zeros(shown)
    for item in evidence:
        m = min(shown, item.length)
        total[:m] += np.nanmean(item.record[sig.ATTENTION_RECEIVED_MEAN], axis=0)[:m]
        uniform[:m] += item.uniform_all[:m]
        n[:m] += 1
    x = np.arange(shown)
    return Lines(
        "profile",
        "Attention received by position",
        "Mean over prompts, layers and heads of the attention a position receives from the queries that see it, "
        "beside what uniform attention would give. The last positions have few queries.",
        (Series("model", x, total / n, emphasis=True), Series("uniform", x, uniform / n)),
        "position",
        "share",
    )
