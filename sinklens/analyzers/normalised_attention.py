"""Normalised attention score: which tokens are salient to a few probe queries."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from sinklens.core.errors import UsageError
from sinklens.core.figures import Figure, Lines, Series
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord, Trace

from .base import Analyzer, Finding, Reference, Status, registry
from .heads import average, mean, usable

MIN_TOKENS = 32


@registry.register("normalised-attention")
@dataclass(frozen=True)
class NormalisedAttention(Analyzer):
    """Tokens by the attention a few probe queries give them, each over the probes that see it.

    How it is computed: the probes are the last 5 % of the queries and as many others, drawn with a seed. Per prompt
    and layer, the score of a token is the mean weight it receives from the probes that see it, mean over heads; it is
    unknown where no probe does. Salient are the tokens of the upper 1 - `unimportant` of the scores. A row is a
    layer; the last columns compare the ranking with that of the other divisor.

    Compared with the paper: ZipCache divides the summed weights of a column by the number of its entries. Its code
    sums over the probes only and still divides by T - k, the number of all queries after the token:
    `recipe="code"`. That favours late tokens, which few queries see at all, over early ones. The code adds up the
    heads that share a key; the mean over all heads used here ranks tokens over the layer instead of per key head.

    When not to trust it: a sink is the most salient token by this score although its value is small. Random probes
    differ between lengths; with few tokens there are only two of them.

    Args:
        recipe: `paper` divides by the probes that see the token, `code` by T - k.
        unimportant: Share of the tokens that are not salient.
    """

    recipe: Literal["paper", "code"] = "paper"
    unimportant: float = 0.4

    name = "normalised-attention"
    title = "Normalised attention score"
    place = 63
    default = False
    formula = (
        '<math display="block"><msub><mover><mi>p</mi><mo>~</mo></mover><mi>k</mi></msub><mo>=</mo><mfrac><mrow>'
        "<munder><mo>∑</mo><mrow><mi>q</mi><mo>∈</mo><mtext>probes</mtext></mrow></munder><msub><mi>A</mi><mrow><mi>q</mi>"
        "<mo>,</mo><mi>k</mi></mrow></msub></mrow><mrow><mtext>number of probes with </mtext><mi>q</mi><mo>≥</mo>"
        "<mi>k</mi></mrow></mfrac></math>"
    )
    needs = frozenset({sig.PROBE_RECEIVED, sig.PROBE_VISIBLE})
    summarises = ("n_prompts", "recipe", "lift", "position", "salient_in_both")
    answers = (("recipe", ("paper", "code")),)
    reference = Reference(
        key="he2024zipcache",
        title="ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification",
        authors="Yefei He and Luoming Zhang and Weijia Wu and Jing Liu and Hong Zhou and Bohan Zhuang",
        year=2024,
        arxiv="2405.14256",
        section="normalized attention score and its approximation by probe tokens",
        code="https://github.com/ThisisBillhe/ZipCache",
        venue="Advances in Neural Information Processing Systems",
    )

    def __post_init__(self) -> None:
        if self.recipe not in ("paper", "code"):
            raise UsageError(
                f"Unknown recipe {self.recipe!r} of normalised-attention.", detail="It has: paper, code."
            )
        if not 0 < self.unimportant < 1:
            raise UsageError(
                f"unimportant of normalised-attention must lie between 0 and 1, got {self.unimportant}."
            )

    def analyze(self, trace: Trace) -> Finding:
        records, reason = usable(trace, self.needs, MIN_TOKENS)
        if reason is not None:
            return self.not_applicable(reason)
        scores = [(score(record), score(record, recipe="code")) for record in records]
        rows = [self._row(scores, layer) for layer in range(len(trace.layers))]
        rows = [row for row in rows if row is not None]
        overlap = average(np.array([row["salient_in_both"] for row in rows]))
        strongest = max(rows, key=lambda row: row["lift"])
        return self.finding(
            Status.FOUND if strongest["lift"] > 2 else Status.NOT_FOUND,
            f"The most salient token (position {strongest['position']}, layer {strongest['layer']}) gets "
            f"{strongest['lift']:.1f} times the median score; the two divisors agree on {100 * (overlap or 0):.0f} % "
            "of the salient tokens.",
            rows=sorted(rows, key=lambda row: (-row["lift"], row["layer"])),
            summary={
                "n_prompts": len(records),
                "recipe": self.recipe,
                "lift": strongest["lift"],
                "position": strongest["position"],
                "salient_in_both": overlap,
            },
            units=UNITS,
            labels=LABELS,
            figures=[_figure(records[0])],
        )

    def _row(self, by_prompt: list[tuple[np.ndarray, np.ndarray]], layer: int) -> dict[str, Any] | None:
        """One layer, mean over the prompts; None for a layer without attention."""
        places, tops, middles, shared = [], [], [], []
        for paper, code in by_prompt:
            scores, coded = paper[layer], code[layer]
            known = ~np.isnan(scores)
            if not known.any():
                continue
            chosen = coded if self.recipe == "code" else scores
            place = int(np.nanargmax(chosen))
            places.append(place)
            tops.append(chosen[place])
            middles.append(np.median(chosen[known]))
            shared.append(self._agreement(scores[known], coded[known]))
        if not places:
            return None
        position, n = Counter(places).most_common(1)[0]
        return {
            "layer": layer,
            "position": position,
            "prompts": n / len(places),
            "score": float(np.mean(tops)),
            "median": float(np.mean(middles)),
            "lift": float(np.mean(tops) / max(float(np.mean(middles)), np.finfo(np.float64).tiny)),
            "salient_in_both": float(np.mean(shared)),
        }

    def _agreement(self, one: np.ndarray, other: np.ndarray) -> float:
        """Share of the salient tokens of one score that are salient by the other too."""
        n = max(round((1 - self.unimportant) * len(one)), 1)
        first, second = (set(np.argsort(-scores, kind="stable")[:n].tolist()) for scores in (one, other))
        return len(first & second) / n


UNITS = {
    "position": "most salient position in most prompts",
    "prompts": "share of prompts in which it is that one",
    "score": "largest score, share of attention, mean over prompts",
    "median": "median score, share of attention, mean over prompts",
    "lift": "ratio of the two",
    "salient_in_both": "share of the salient tokens that both divisors name",
}
LABELS = {
    "prompts": "prompts that agree",
    "lift": "largest against median",
    "salient_in_both": "salient by both divisors",
    "unimportant": "share of tokens that are not salient",
}


def score(record: PromptRecord, *, recipe: str = "paper") -> Float[np.ndarray, "layer pos"]:
    """Score of every token in every layer; NaN where no probe query sees it."""
    scores = record[sig.PROBE_RECEIVED].astype(np.float64)
    if recipe == "paper":
        return scores
    return scores * record[sig.PROBE_VISIBLE] / (len(record) - np.arange(len(record)))


def _figure(record: PromptRecord) -> Figure:
    x = np.arange(len(record))
    by_recipe = {recipe: mean(list(score(record, recipe=recipe))) for recipe in ("paper", "code")}
    return Lines(
        "prompt",
        "Normalised attention score with both divisors",
        f"Prompt {record.index}, mean over heads and layers. The paper divides by the probe queries that see the "
        "token, its code by all queries after it.",
        (
            Series("paper", x, by_recipe["paper"], emphasis=True),
            Series("code", x, by_recipe["code"]),
        ),
        "position",
        "share",
        log_y=True,
    )
