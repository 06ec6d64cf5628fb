"""What the last queries of a prompt give to its first tokens, against what uniform attention would give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sinklens.core.counts import counted
from sinklens.core.figures import Figure, Heatmap, Lines, Series
from sinklens.core.papers import SINK_PROFILER
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord, Trace

from .base import Analyzer, Finding, Status, registry
from .heads import PerHead, average, mean, number, usable

TAIL = 64
FIRST = (1, 4, 8)


@registry.register("window-shares")
@dataclass(frozen=True)
class WindowShares(Analyzer):
    """How much of their attention the last 64 queries spend on the first 1, 4 and 8 tokens.

    How it is computed: per prompt, layer and head, the weights of the last 64 queries (all, if there are fewer) are
    averaged per key; the share of the first K tokens is the sum over them. The boost is that share over what
    uniform causal attention of the same queries would give: the mean of min(K, q + 1) / (q + 1). Means over prompts.
    Found: the boost of the first 4 tokens, mean over all heads, is at least `least_boost`.

    Compared with the paper: there is no paper, the definitions are those of a published program. It reads one text
    repeated to the wanted length; here any prompts are read and averaged. As there, keys that a query cannot see
    count as weight 0, so in layers with a sliding window the shares are small by construction and the uniform share
    is that of full attention. Its share of queries whose largest weight lies on the first tokens is left out;
    primary-sinks has it over all queries. The published program judges nothing; `least_boost` is ours.

    When not to trust it: the boost grows with the length of the prompt because the uniform share shrinks like K / T,
    so boosts at different lengths are not comparable. A sink elsewhere than on the first tokens is not seen. The mean
    over all heads can stay below `least_boost` where a few heads have a sink: read the rows.

    Args:
        least_boost: Mean boost of the first 4 tokens that counts as found; uniform attention has 1.
    """

    min_tokens: int = 64
    least_boost: float = 1.5

    name = "window-shares"
    title = "Attention of the last queries to the first tokens"
    place = 62
    default = False
    formula = (
        '<math display="block"><msub><mi>boost</mi><mi>K</mi></msub><mo>=</mo><mfrac><mrow><munder><mo>∑</mo><mrow>'
        "<mi>k</mi><mo>&lt;</mo><mi>K</mi></mrow></munder><munder><mi>mean</mi><mrow><mi>q</mi><mo>≥</mo><mi>T</mi>"
        "<mo>−</mo><mn>64</mn></mrow></munder><mspace width='0.2em'/><msub><mi>A</mi><mrow><mi>q</mi><mo>,</mo>"
        "<mi>k</mi></mrow></msub></mrow><mrow><munder><mi>mean</mi><mrow><mi>q</mi><mo>≥</mo><mi>T</mi><mo>−</mo>"
        "<mn>64</mn></mrow></munder><mspace width='0.2em'/><mfrac><mrow><mi>min</mi><mo>(</mo><mi>K</mi><mo>,</mo>"
        "<mi>q</mi><mo>+</mo><mn>1</mn><mo>)</mo></mrow><mrow><mi>q</mi><mo>+</mo><mn>1</mn></mrow></mfrac></mrow>"
        "</mfrac></math>"
    )
    needs = frozenset({sig.ATTENTION_TAIL, sig.TAIL_PEAK, sig.KEPT_POSITIONS, sig.VISIBLE_QUERIES})
    summarises = (
        "n_prompts", "seq_len", "share_1", "share_4", "share_8", "boost_1", "boost_4", "boost_8",
        "boost_4_by_layer",
    )  # fmt: skip
    reference = SINK_PROFILER

    def analyze(self, trace: Trace) -> Finding:
        records, reason = usable(trace, self.needs, self.min_tokens, looks_back=True)
        if reason is not None:
            return self.not_applicable(reason)
        shares = {k: mean([first_share(record, k) for record in records]) for k in FIRST}
        boosts = {k: mean([first_share(r, k) / uniform_share(len(r), k) for r in records]) for k in FIRST}
        peak = mean([record[sig.TAIL_PEAK] for record in records])
        rows = _rows(shares, boosts, peak)
        summary = {
            "n_prompts": len(records),
            "seq_len": int(np.median([len(record) for record in records])),
            **{f"share_{k}": average(shares[k]) for k in FIRST},
            **{f"boost_{k}": average(boosts[k]) for k in FIRST},
            "boost_4_by_layer": [average(layer) for layer in boosts[4]],
        }
        boost = summary["boost_4"]
        found = boost >= self.least_boost
        verdict = (
            f"The last {TAIL} queries spend {100 * summary['share_4']:.1f} % of their attention on the first 4 tokens, "
            f"{boost:.2f} times what uniform attention would, mean over all heads"
        )
        verdict += "." if found else f": less than the {self.least_boost:g} times that count as a preference."
        return self.finding(
            Status.FOUND if found else Status.NOT_FOUND,
            verdict,
            rows=rows,
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=_figures(boosts, len(records)),
            notes=_notes(records),
        )


UNITS = {
    **{f"share_{k}": f"share of the last queries' attention on the first {k} tokens" for k in FIRST},
    **{f"boost_{k}": "ratio of that share to uniform attention" for k in FIRST},
    "peak_share": "largest mean weight of one key",
}
LABELS = {
    **{f"share_{k}": f"attention to the first {k}" for k in FIRST},
    **{f"boost_{k}": f"first {k} against uniform" for k in FIRST},
    "boost_4_by_layer": "first 4 against uniform, by layer",
    "peak_share": "largest weight of one key",
    "seq_len": "median prompt length",
    "least_boost": "boost that counts as found",
}


def first_share(record: PromptRecord, count: int) -> PerHead:
    """Share of the last queries' attention on the first tokens, which every record keeps."""
    first = record[sig.KEPT_POSITIONS] < count
    return record[sig.ATTENTION_TAIL][:, :, first].astype(np.float64).sum(-1)


def uniform_share(length: int, count: int, tail: int = TAIL) -> float:
    """What uniform causal attention of the last queries would give to the first tokens."""
    seen = np.arange(max(length - tail, 0), length) + 1
    return float(np.mean(np.minimum(count, seen) / seen))


def _rows(
    shares: dict[int, PerHead], boosts: dict[int, PerHead], peak: Float[np.ndarray, "layer head"]
) -> list[dict[str, Any]]:
    rows = [
        {
            "layer": layer,
            "head": head,
            **{f"share_{k}": float(shares[k][layer, head]) for k in FIRST},
            **{f"boost_{k}": float(boosts[k][layer, head]) for k in FIRST},
            "peak_share": number(peak[layer, head]),
        }
        for layer, head in np.argwhere(~np.isnan(shares[4])).tolist()
    ]
    rows.sort(key=lambda row: (-row["boost_4"], row["layer"], row["head"]))
    return rows


def _figures(boosts: dict[int, PerHead], n: int) -> list[Figure]:
    layers = np.arange(len(boosts[4]))
    by_layer = {k: np.array([np.nan if (a := average(v)) is None else a for v in boosts[k]]) for k in FIRST}
    return [
        Heatmap(
            "boost",
            "Attention to the first 4 tokens over uniform attention",
            f"Share of the attention of the last {TAIL} queries on the first 4 tokens over the uniform share; mean "
            f"over {counted(n, 'prompt')}.",
            boosts[4],
            "ratio to uniform",
        ),
        Lines(
            "by_layer",
            "Attention to the first tokens over uniform attention, by layer",
            f"The last {TAIL} queries; mean over heads and {counted(n, 'prompt')}. Uniform attention gives 1.",
            tuple(Series(f"first {k}", layers, by_layer[k], emphasis=k == 4) for k in FIRST),
            "layer",
            "ratio to uniform",
        ),
    ]


def _notes(records: list[PromptRecord]) -> list[str]:
    lengths = {len(record) for record in records}
    return ["The prompts differ in length, and boosts depend on length."] if len(lengths) > 1 else []
