"""Primary attention sinks: Sink^epsilon with the position found, not assumed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from sinklens.core.adjustable import epsilons
from sinklens.core.counts import counted, verb
from sinklens.core.errors import UsageError
from sinklens.core.papers import WHEN_SINKS_EMERGE
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord, Trace

from .base import Analyzer, Finding, Status, registry
from .estimates import sampled_rows
from .evidence import Column, SinkEvidence, column, gather, norm_sinks
from .primary_figures import draw, upper_half, value_drain
from .primary_sweep import sweep
from .primary_words import LABELS, UNITS, tiles, verdict


@registry.register("primary-sinks")
@dataclass(frozen=True)
class PrimarySinks(Analyzer):
    """Key positions that many heads attend to far beyond their share.

    How it is computed: for every prompt, layer and head, alpha_k is the mean attention that key k receives from the
    queries that see it. Per prompt, layer and head it is compared with epsilon (strictly greater); only then are
    the comparisons averaged: that is the sink rate of position k, in percent. A head sinks on a position if it
    exceeds epsilon, and `min_lift` times what uniform attention would give the position, in at least `min_prompts`
    of the prompts that have it. A position is a row if at least one head sinks on it, or if its rate reaches
    `min_rate` without any single head doing so. Sinks by hidden-state norm are found separately and compared.

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
    min_prompts: float = 0.5
    min_visible: int = 16
    min_tokens: int = 32
    norm_ratio: float = 10.0

    name = "primary-sinks"
    title = "Primary sinks"
    place = 10
    formula = (
        '<math display="block"><msubsup><mi>Sink</mi><mi>k</mi><mi>ε</mi></msubsup><mo>=</mo><mn>100</mn><mo>·</mo>'
        "<munder><mi>mean</mi><mtext>prompts, layers, heads</mtext></munder><mspace width='0.3em'/><mn>1</mn><mrow>"
        "<mo>[</mo><mfrac><mrow><munder><mo>∑</mo><mi>q</mi></munder><msub><mi>A</mi><mrow><mi>q</mi><mo>,</mo>"
        "<mi>k</mi></mrow></msub></mrow><mrow><msub><mi>n</mi><mi>vis</mi></msub><mo>(</mo><mi>k</mi><mo>)</mo></mrow>"
        "</mfrac><mo>&gt;</mo><mi>ε</mi><mo>]</mo></mrow></math>"
    )
    optional = frozenset({sig.VALUE_NORM, sig.VALUE_NORM_MEAN})
    from_samples = frozenset({sig.ATTENTION_SELF, sig.FIRST_MASS})
    needs = frozenset(
        {
            sig.ATTENTION_RECEIVED,
            sig.ATTENTION_RECEIVED_MEAN,
            sig.ATTENTION_RECEIVED_PEAK,
            sig.KEPT_POSITIONS,
            sig.VISIBLE_QUERIES,
            sig.ATTENTION_SELF,
            sig.ATTENTION_TOP1,
            sig.FIRST_MASS,
            sig.LEARNED_SINK_MASS,
            sig.VALUE_NORM,
            sig.VALUE_NORM_MEAN,
            sig.RESIDUAL_NORM,
        }
    )
    summarises = (
        "sink_rate", "sink_rate_ci_low", "sink_rate_ci_high", "strongest_position", "share",
        "uniform_share", "epsilon", "heads_in_all", "first_position_rate", "first_position_share",
        "seq_len", "seq_len_min", "seq_len_max", "n_prompts", "heads", "dormant_heads", "learned_sink_mass",
        "value_drain", "norm_sink_positions", "agree", "attention_only", "norm_only", "share_se",
        "rate_low", "rate_high", "rows_sampled", "rows_in_all",
    )  # fmt: skip
    reference = WHEN_SINKS_EMERGE.at("3, attention sink metric")

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
        records = self.used(trace)
        if not records:
            longest = max((len(record) for record in trace), default=0)
            return self.not_applicable(
                f"sink rates need prompts of at least {self.min_tokens} tokens; the longest has {longest}."
            )
        if self.exclude_diagonal and any(sig.ATTENTION_SELF.name not in r.arrays for r in records):
            return self.not_applicable(
                "a position's attention to itself was not recorded, so it cannot be left out (exclude_diagonal)."
            )
        evidence = self.evidence(records)
        columns = self._columns(evidence)
        rows = [self._row(evidence, found) for found in columns if self._is_sink(found)]
        rows.sort(key=lambda row: (-row["rate"], -row["share"], row["position"]))
        strongest = self._strongest(columns, rows)
        summary = self._summary(trace, evidence, strongest, rows)
        return self.finding(
            Status.FOUND if rows else Status.NOT_FOUND,
            verdict(rows, summary),
            rows=rows,
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=draw(evidence, strongest, self._sink_heads(strongest), self.epsilon, self.min_prompts),
            tiles=tiles(rows, summary),
            notes=self._notes(trace, evidence, summary),
            swept=lambda: self._swept(trace, summary),
        )

    def used(self, trace: Trace) -> list[PromptRecord]:
        """The prompts that are long enough."""
        return [record for record in trace if len(record) >= self.min_tokens]

    def evidence(self, records: list[PromptRecord]) -> list[SinkEvidence]:
        """What the rule reads of them."""
        code = self.recipe == "code"
        return [
            gather(
                record,
                min_visible=self.min_visible,
                code_divisor=code,
                exclude_diagonal=self.exclude_diagonal,
            )
            for record in records
        ]

    def _swept(self, trace: Trace, summary: dict[str, Any]) -> dict[float, Finding]:
        """The finding at every epsilon of a page's grid: sentence, boxes, notes, and the rows by position, the first
        one whole. The same as a new analysis says, without what no sentence needs."""
        evidence = self.evidence(self.used(trace))
        norm = set(summary["norm_sink_positions"])
        held: dict[int, Column] = {}
        found = {}
        for epsilon, sinks, strongest in sweep(self, evidence, epsilons(self.epsilon)):
            at = replace(self, epsilon=epsilon)
            if strongest not in held:
                held[strongest] = column(evidence, strongest, self.min_visible)
            rows: list[dict[str, Any]] = [{"position": position} for position in sinks]
            rows[:1] = [at._row(evidence, held[strongest])] if rows else []
            told = {**summary, **at._told(evidence, held[strongest]), **_agreement(rows, norm)}
            found[epsilon] = at.finding(
                Status.FOUND if rows else Status.NOT_FOUND,
                verdict(rows, told),
                rows=rows,
                summary=told,
                tiles=tiles(rows, told),
                notes=at._notes(trace, evidence, told),
            )
        return found

    def _columns(self, evidence: list[SinkEvidence]) -> list[Column]:
        """The positions that some prompt kept, that enough queries see, and that can be a sink.

        A position that no head in any prompt gives more than epsilon has rate 0 and no sink head. Where that is so
        for all of them, all are returned, so that the strongest can be named.
        """
        kept = self.candidates(evidence)
        if self.min_rate > 0:
            kept = kept & self._reached(evidence) or kept
        return [column(evidence, k, self.min_visible) for k in sorted(kept)]

    def candidates(self, evidence: list[SinkEvidence]) -> set[int]:
        """Positions that some prompt kept and that enough of its queries see."""
        return {int(k) for item in evidence for k in item.positions if item.is_seen(int(k), self.min_visible)}

    def _reached(self, evidence: list[SinkEvidence]) -> set[int]:
        """Positions that some head in some prompt gives more than epsilon."""
        above = (item.positions[(item.alpha > self.epsilon).any((0, 1))] for item in evidence)
        return {int(k) for positions in above for k in positions}

    def _is_sink(self, found: Column) -> bool:
        return bool(self._sink_heads(found)) or (
            found.rate(self.epsilon) >= 100 * self.min_rate
            and found.share.mean() >= self.min_lift * found.uniform.mean()
        )

    def _sink_heads(self, found: Column) -> list[tuple[int, int, float]]:
        return found.heads(self.epsilon, self.min_lift, self.min_prompts)

    def _strongest(self, columns: list[Column], rows: list[dict[str, Any]]) -> Column:
        """The first row's position; where no position is a sink, the one with the largest rate, then share."""
        if rows:
            return next(found for found in columns if found.position == rows[0]["position"])
        return max(columns, key=lambda found: (found.rate(self.epsilon), float(found.share.mean())))

    def _row(self, evidence: list[SinkEvidence], found: Column) -> dict[str, Any]:
        heads = self._sink_heads(found)
        layers = sorted({layer for layer, *_ in heads})
        token, token_id, same = _common_token([item.record for item in evidence], found.position)
        return {
            "position": found.position,
            "token": token,
            "token_id": token_id,
            "share": float(found.share.mean()),
            "lift": float(found.share.mean() / found.uniform.mean()),
            "rate": found.rate(self.epsilon),
            "n_prompts": int((found.rates(self.epsilon) > 0).sum()),
            "first_layer": layers[0] if layers else None,
            "last_layer": layers[-1] if layers else None,
            "n_heads": len(heads),
            "top1_share": float(np.nanmean(found.top1)),
            "same_token_share": same,
            **self._doubt(evidence, found),
        }

    def _doubt(self, evidence: list[SinkEvidence], found: Column) -> dict[str, Any]:
        """How sure share and rate are where query rows were sampled; nothing where all were looked at."""
        if not any(sig.SAMPLED_ROWS in item.record.arrays for item in evidence):
            return {}
        low, high = found.rate_between(self.epsilon)
        return {"share_se": found.share_error, "rate_low": low, "rate_high": high}

    def _summary(
        self, trace: Trace, evidence: list[SinkEvidence], strongest: Column, rows: list[dict[str, Any]]
    ) -> dict[str, Any]:
        lengths = [item.length for item in evidence]
        records = [item.record for item in evidence]
        norm = norm_sinks(records, self.norm_ratio)
        low, high = _interval(strongest.rates(self.epsilon))
        first = column(evidence, 0, 1)
        return {
            "sink_rate": strongest.rate(self.epsilon),
            "sink_rate_ci_low": low,
            "sink_rate_ci_high": high,
            **self._told(evidence, strongest),
            "first_position_rate": first.rate(self.epsilon),
            "first_position_share": float(first.share.mean()),
            "seq_len": int(np.median(lengths)),
            "seq_len_min": min(lengths),
            "seq_len_max": max(lengths),
            "n_prompts": len(evidence),
            "heads": [list(head) for head in self._sink_heads(strongest)],
            "dormant_heads": _dormant_heads(records) if strongest.position == 0 else [],
            "learned_sink_mass": _learned_mass(trace),
            "value_drain": _smallest_drain(evidence, strongest.position),
            "norm_sink_positions": sorted(norm),
            **sampled_rows(records),
            **_agreement(rows, norm),
        }

    def _told(self, evidence: list[SinkEvidence], strongest: Column) -> dict[str, Any]:
        """What sentences and boxes say of the strongest position."""
        return {
            "sink_rate": strongest.rate(self.epsilon),
            "strongest_position": strongest.position,
            "share": float(strongest.share.mean()),
            "uniform_share": float(strongest.uniform.mean()),
            "epsilon": self.epsilon,
            "heads_in_all": int((~np.isnan(strongest.alpha[0])).sum()),
            **self._doubt(evidence, strongest),
        }

    def _notes(self, trace: Trace, evidence: list[SinkEvidence], summary: dict[str, Any]) -> list[str]:
        notes = []
        if len({item.length for item in evidence}) > 1:
            notes.append(
                "The prompts differ in length, and sink rates depend on length; fix it with --seq-len."
            )
        skipped = len(trace) - len(evidence)
        if skipped:
            notes.append(
                f"{counted(skipped, 'prompt')} shorter than {self.min_tokens} tokens "
                f"{verb(skipped, 'was', 'were')} left out."
            )
        if "rows_sampled" in summary:
            notes.append(
                "Shares and rates are estimates. The standard error of a share is a bound (heads and layers read the "
                "same query rows); a rate lies between what exceeds epsilon by 1.96 standard errors and what may. "
                "Which positions were kept was decided by the estimates too. An interval is too short for keys that "
                "few queries look at: what a key gets from a single row is missed with that row."
            )
        if any(item.left_out > self.epsilon for item in evidence):
            notes.append("Some prompts have more strong positions than were kept; raise --keep-positions.")
        if summary["norm_only"]:
            notes.append(
                f"Positions {summary['norm_only']} have sink-like hidden-state norms but attract no attention."
            )
        if summary["learned_sink_mass"] is not None:
            notes.append(
                f"The model has learned sink logits that take {100 * summary['learned_sink_mass']:.1f} % of all "
                "attention; rows are not renormalised."
            )
        return notes


def _agreement(rows: list[dict[str, Any]], norm: set[int]) -> dict[str, list[int]]:
    by_attention = {row["position"] for row in rows}
    return {
        "agree": sorted(by_attention & norm),
        "attention_only": sorted(by_attention - norm),
        "norm_only": sorted(norm - by_attention),
    }


def _smallest_drain(evidence: list[SinkEvidence], position: int) -> float | None:
    drain = value_drain(evidence, position)
    return float(np.nanmin(drain)) if drain is not None else None


def _learned_mass(trace: Trace) -> float | None:
    """Mean mass on learned sink logits, None for models without them."""
    name = sig.LEARNED_SINK_MASS.name
    masses = [float(np.nanmean(record.arrays[name])) for record in trace if name in record.arrays]
    return float(np.mean(masses)) if masses else None


def _common_token(records: list[PromptRecord], position: int) -> tuple[str, int, float]:
    holders = [record for record in records if position < len(record)]
    counts = Counter((record.pieces[position], int(record.token_ids[position])) for record in holders)
    (token, token_id), n = counts.most_common(1)[0]
    return token, token_id, n / len(holders)


def _dormant_heads(records: list[PromptRecord]) -> list[list[float]]:
    """Heads that give the first token more than half of their mass on at least a quarter of the queries."""
    if any(sig.FIRST_MASS.name not in record.arrays for record in records):
        return []
    upper = upper_half(records)
    return [[int(i), int(j), float(upper[i, j])] for i, j in np.argwhere(upper >= 0.25)]


def _interval(per_prompt: Float[np.ndarray, " prompt"]) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of the mean over prompts, seeded; None for fewer than two prompts."""
    if len(per_prompt) < 2:
        return None, None
    draws = np.random.default_rng(0).choice(per_prompt, (2000, len(per_prompt))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
