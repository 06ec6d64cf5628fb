"""Entropy of rows and columns of the attention map, and the sink heads they point to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from sinklens.core.counts import counted, verb
from sinklens.core.errors import UsageError
from sinklens.core.figures import Figure, Heatmap
from sinklens.core.papers import ACTIVE_DORMANT
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord, Trace

from .base import Analyzer, Finding, Status, registry
from .heads import PerHead, at_position, average, mean, named, number, usable


@registry.register("attention-entropy")
@dataclass(frozen=True)
class AttentionEntropy(Analyzer):
    """Heads whose queries are focused while one key is looked at evenly by all: sink heads by entropy.

    How it is computed: the entropy of a row is -sum A log A over its keys, averaged over queries, in nats and over
    the logarithm of the keys the row sees. The entropy of a column is that of the key's weights over the queries,
    normalised to sum 1, over the logarithm of the queries that see it. On a prompt a head is a sink head if the mean
    row ratio is below `row` and the largest column ratio above `column`; it becomes a row of the table if that holds
    in at least half of the prompts.

    Compared with the paper: the rule stands in the code of Guo et al. without thresholds. 0.5 and 0.9 are ours: with
    64 keys a row that puts two thirds on one key and spreads the rest has a ratio of 0.5, and a key that gets the
    same from every query has 1. In the code the last columns, with two or three queries, reach 1 trivially; here only
    keys that at least 16 queries see take part (`k <= T - 16`). Lengths of rows and columns follow what is visible,
    so windows are right.

    When not to trust it: the rule does not ask how much a key receives. A key that gets equally little from everyone
    has an even column too; read `share`, or ask for `min_share`. Entropy says nothing about which key it is.

    Args:
        row: Largest mean row entropy, as a share of the possible.
        column: Smallest entropy of the most even column.
        min_share: Smallest mean attention of that key; 0, as in the code, asks for none.
    """

    row: float = 0.5
    column: float = 0.9
    min_share: float = 0.0

    name = "attention-entropy"
    title = "Attention entropy"
    place = 55
    default = False
    formula = (
        "<math display=\"block\"><munder><mi>mean</mi><mi>q</mi></munder><mspace width='0.2em'/><mfrac><mrow><mi>H</mi>"
        "<mo>(</mo><msub><mi>A</mi><mrow><mi>q</mi><mo>,</mo><mo>·</mo></mrow></msub><mo>)</mo></mrow><mrow><mi>ln</mi>"
        "<mo>(</mo><mi>q</mi><mo>+</mo><mn>1</mn><mo>)</mo></mrow></mfrac><mo>&lt;</mo><msub><mi>τ</mi><mi>row</mi>"
        "</msub><mo>∧</mo><munder><mi>max</mi><mi>k</mi></munder><mspace width='0.2em'/><mfrac><mrow><mi>H</mi><mo>("
        "</mo><msub><mi>A</mi><mrow><mo>·</mo><mo>,</mo><mi>k</mi></mrow></msub><mo>)</mo></mrow><mrow><mi>ln</mi><mo>("
        "</mo><mi>T</mi><mo>−</mo><mi>k</mi><mo>)</mo></mrow></mfrac><mo>&gt;</mo><msub><mi>τ</mi><mi>col</mi></msub>"
        "</math>"
    )
    needs = frozenset(
        {
            sig.ATTENTION_ENTROPY,
            sig.ATTENTION_ENTROPY_NORMALISED,
            sig.COLUMN_ENTROPY,
            sig.COLUMN_ENTROPY_PEAK,
            sig.ATTENTION_RECEIVED,
            sig.KEPT_POSITIONS,
        }
    )
    summarises = ("n_sink_heads", "n_heads", "row_entropy", "row_ratio", "column_ratio", "column_ratio_first")
    reference = ACTIVE_DORMANT.at("code only: LLM/src/entropy.py and LLM/src/hook.py")

    def __post_init__(self) -> None:
        for name in ("row", "column"):
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(f"{name} of attention-entropy must lie above 0 and be at most 1.")

    def analyze(self, trace: Trace) -> Finding:
        records, reason = usable(trace, self.needs, 32)
        if reason is not None:
            return self.not_applicable(reason)
        raw = mean([record[sig.ATTENTION_ENTROPY] for record in records])
        ratio = mean([record[sig.ATTENTION_ENTROPY_NORMALISED] for record in records])
        peak = mean([record[sig.COLUMN_ENTROPY_PEAK] for record in records])
        first = [at_position(record, sig.COLUMN_ENTROPY, 0) for record in records]
        hits = np.stack([self.is_sink_head(record) for record in records]).mean(0)
        sinks = (hits >= 0.5) & ~np.isnan(ratio)
        column_first = mean([f for f in first if f is not None])
        rows = [
            {
                "layer": layer,
                "head": head,
                "row_entropy": float(raw[layer, head]),
                "row_ratio": float(ratio[layer, head]),
                "column_ratio": float(peak[layer, head]),
                "column_ratio_first": number(column_first[layer, head]),
                **_peak(records, layer, head),
                "prompts": float(hits[layer, head]),
            }
            for layer, head in np.argwhere(sinks).tolist()
        ]
        rows.sort(key=lambda row: (row["row_ratio"], row["layer"], row["head"]))
        known = int((~np.isnan(ratio)).sum())
        where = [(row["layer"], row["head"]) for row in rows]
        text = (
            f"{len(rows)} of {known} heads {verb(len(rows), 'is a sink head', 'are sink heads')} by entropy"
        )
        return self.finding(
            Status.FOUND if rows else Status.NOT_FOUND,
            f"{text}: {named(where, 2)}." if rows else f"{text}.",
            rows=rows,
            summary={
                "n_sink_heads": len(rows),
                "n_heads": known,
                "row_entropy": average(raw),
                "row_ratio": average(ratio),
                "column_ratio": average(peak),
                "column_ratio_first": average(column_first),
            },
            units=UNITS,
            labels=LABELS,
            figures=_figures(ratio, peak, sinks, len(records)),
        )

    def is_sink_head(self, record: PromptRecord) -> np.ndarray:
        """Which heads meet the rule on one prompt."""
        share = np.nan_to_num(share_at_peak(record), nan=0.0)
        return (
            (record[sig.ATTENTION_ENTROPY_NORMALISED] < self.row)
            & (record[sig.COLUMN_ENTROPY_PEAK] > self.column)
            & (share >= self.min_share)
        )


UNITS = {
    "row_entropy": "nats, mean over queries and prompts",
    "row_ratio": "row entropy over the logarithm of the keys seen, mean over queries and prompts",
    "column_ratio": "entropy of the most even column over the logarithm of the queries that see it",
    "column_ratio_first": "the same of the first token's column",
    "position": "key with the most even column in most prompts",
    "share": "mean attention that key receives",
    "prompts": "share of prompts in which the rule holds",
}
LABELS = {
    "row_entropy": "row entropy",
    "row_ratio": "row entropy against uniform",
    "column_ratio": "most even column against even",
    "column_ratio_first": "first token's column against even",
    "share": "attention to that key",
    "prompts": "prompts that agree",
    "n_sink_heads": "sink heads by entropy",
    "row": "largest row entropy against uniform",
    "column": "least column entropy against even",
    "min_share": "least attention to that key",
}


def share_at_peak(record: PromptRecord) -> PerHead:
    """Mean attention received by the key with the most even column; NaN if the record did not keep that key."""
    kept, places = record[sig.KEPT_POSITIONS], record[f"{sig.COLUMN_ENTROPY_PEAK.name}_pos"]
    at = np.minimum(np.searchsorted(kept, places), len(kept) - 1)
    share = np.take_along_axis(record[sig.ATTENTION_RECEIVED], at[..., None], -1)[..., 0]
    return np.where(kept[at] == places, share, np.nan)


def _peak(records: list[PromptRecord], layer: int, head: int) -> dict[str, Any]:
    """The key that is most even in most prompts, and what it receives there."""
    places = [int(record[f"{sig.COLUMN_ENTROPY_PEAK.name}_pos"][layer, head]) for record in records]
    position = Counter(places).most_common(1)[0][0]
    shares = [
        share_at_peak(record)[layer, head]
        for record, place in zip(records, places, strict=True)
        if place == position
    ]
    return {"position": position, "share": average(np.array(shares))}


def _figures(ratio: PerHead, peak: PerHead, sinks: np.ndarray, n: int) -> list[Figure]:
    rings = tuple((int(a), int(b)) for a, b in np.argwhere(sinks))
    return [
        Heatmap(
            "rows",
            "Row entropy: how widely queries spread their attention",
            f"Over the logarithm of the keys a row sees; mean over queries and {counted(n, 'prompt')}. 0 is one "
            "key, 1 is "
            "uniform. Rings: sink heads by entropy.",
            ratio,
            "ratio",
            marks=rings,
            limits=(0.0, 1.0),
        ),
        Heatmap(
            "columns",
            "Column entropy: how evenly the most evenly attended key is looked at",
            "Of the weights of one key over the queries that see it, normalised to sum 1, over the logarithm of their "
            f"number; largest over keys that at least 16 queries see, mean over {counted(n, 'prompt')}.",
            peak,
            "ratio",
            marks=rings,
            limits=(0.0, 1.0),
        ),
    ]
