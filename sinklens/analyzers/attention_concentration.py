"""Attention concentration: token weights for quantisation, and what a sink does to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from sinklens.core.counts import counted
from sinklens.core.errors import UsageError
from sinklens.core.figures import Figure, Heatmap, Lines, Series
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord, Trace

from .base import Analyzer, Finding, Reference, Status, registry
from .heads import mean, n_heads, usable

SHOWN = 64


@registry.register("attention-concentration")
@dataclass(frozen=True)
class AttentionConcentration(Analyzer):
    """Tokens by all the attention they receive in a layer, scaled to weights between 1 and 3.

    How it is computed: per prompt and layer, the weights of all heads and queries on a token are added up, and the
    sums are scaled so that the smallest becomes `low` and the largest `high`. A layer is a row: the token with the
    largest weight, the mean weight, and the share of the other tokens within a twentieth of the range above `low`,
    which the scale hardly tells apart.

    Compared with the paper: RSQ weights the tokens of its calibration data so. By default, as there, nothing corrects
    for the number of queries that see a token, so early tokens get more; its code can divide by that number or by
    its root before scaling (`divide`). Here that is the number of queries that do see the token, which is T - k
    there and under causal attention.

    When not to trust it: a sink takes the upper end alone and presses all others towards the lower: read `pressed`.

    Args:
        divide: `none`, `linear` (by the queries that see the token) or `root` (by its square root).
    """

    low: float = 1.0
    high: float = 3.0
    divide: Literal["none", "linear", "root"] = "none"

    name = "attention-concentration"
    title = "Attention concentration"
    place = 64
    default = False
    formula = (
        '<math display="block"><msub><mi>w</mi><mi>k</mi></msub><mo>=</mo><munder><mo>∑</mo><mrow><mi>h</mi><mo>,</mo>'
        "<mi>q</mi></mrow></munder><msubsup><mi>A</mi><mrow><mi>q</mi><mo>,</mo><mi>k</mi></mrow><mi>h</mi></msubsup>"
        "<mo>,</mo><mspace width='2em'/><msub><mi>r</mi><mi>k</mi></msub><mo>=</mo><mn>1</mn><mo>+</mo><mn>2</mn>"
        "<mfrac><mrow><msub><mi>w</mi><mi>k</mi></msub><mo>−</mo><mi>min</mi><mspace width='0.2em'/><mi>w</mi></mrow>"
        "<mrow><mi>max</mi><mspace width='0.2em'/><mi>w</mi><mo>−</mo><mi>min</mi><mspace width='0.2em'/><mi>w</mi>"
        "</mrow></mfrac></math>"
    )
    needs = frozenset({sig.ATTENTION_RECEIVED, sig.ATTENTION_RECEIVED_MEAN, sig.VISIBLE_QUERIES})
    summarises = ("n_prompts", "pressed", "mean_weight")
    reference = Reference(
        key="sung2025rsq",
        title="RSQ: Learning from Important Tokens Leads to Better Quantized LLMs",
        authors="Yi-Lin Sung and Prateek Yadav and Jialu Li and Jaehong Yoon and Mohit Bansal",
        year=2025,
        arxiv="2503.01820",
        section="attention concentration (AttnCon)",
        code="https://github.com/ylsung/rsq",
    )

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise UsageError("attention-concentration needs low < high.")
        if self.divide not in ("none", "linear", "root"):
            raise UsageError(
                f"Unknown divide {self.divide!r} of attention-concentration.",
                detail="It has: none, linear, root.",
            )

    def analyze(self, trace: Trace) -> Finding:
        records, reason = usable(trace, self.needs)
        if reason is not None:
            return self.not_applicable(reason)
        weights = [self.weights(record) for record in records]
        rows = [
            self._row(layer, [w[layer] for w in weights])
            for layer in range(len(trace.layers))
            if not np.isnan(weights[0][layer]).any()
        ]
        pressed = float(np.mean([row["pressed"] for row in rows]))
        limit = self.low + (self.high - self.low) / 20
        return self.finding(
            Status.FOUND if pressed > 0.5 else Status.NOT_FOUND,
            f"{100 * pressed:.0f} % of the tokens beside the heaviest weigh less than {limit:g} on the scale from "
            f"{self.low:g} to {self.high:g}, mean over layers and prompts.",
            rows=rows,
            summary={
                "n_prompts": len(records),
                "pressed": pressed,
                "mean_weight": float(np.mean([row["mean_weight"] for row in rows])),
            },
            units=UNITS,
            labels=LABELS,
            figures=_figures(weights, rows),
        )

    def weights(self, record: PromptRecord) -> Float[np.ndarray, "layer pos"]:
        """Weight of every token in every layer, between `low` and `high`; NaN in layers without attention.

        Where all tokens are alike there is nothing to scale, and all get `low`.
        """
        seen = record[sig.VISIBLE_QUERIES].astype(np.float64)
        total = record[sig.ATTENTION_RECEIVED_MEAN].astype(np.float64) * seen * n_heads(record)
        if self.divide != "none":
            count = np.maximum(seen, 1)
            total = total / (np.sqrt(count) if self.divide == "root" else count)
        low, high = total.min(1, keepdims=True), total.max(1, keepdims=True)
        span = np.where(high > low, high - low, 1.0)
        return self.low + (self.high - self.low) * (total - low) / span

    def _row(self, layer: int, weights: list[np.ndarray]) -> dict[str, Any]:
        places = [int(w.argmax()) for w in weights]
        position = max(set(places), key=lambda place: (places.count(place), -place))
        limit = self.low + (self.high - self.low) / 20
        others = [np.delete(w, place) for w, place in zip(weights, places, strict=True)]
        return {
            "layer": layer,
            "position": position,
            "prompts": places.count(position) / len(places),
            "mean_weight": float(np.mean([w.mean() for w in weights])),
            "first_weight": float(np.mean([w[0] for w in weights])),
            "pressed": float(np.mean([(w < limit).mean() for w in others])),
        }


UNITS = {
    "position": "heaviest position in most prompts",
    "prompts": "share of prompts in which it is that one",
    "mean_weight": "on the scale from low to high, mean over tokens and prompts",
    "first_weight": "weight of the first token, mean over prompts",
    "pressed": "share of the other tokens in the lowest twentieth of the scale",
}
LABELS = {
    "prompts": "prompts that agree",
    "first_weight": "weight of the first token",
    "pressed": "tokens hardly told apart",
    "low": "smallest weight",
    "high": "largest weight",
    "divide": "divided by the queries that see the token",
}


def _figures(weights: list[np.ndarray], rows: list[dict[str, Any]]) -> list[Figure]:
    length = min(min(w.shape[1] for w in weights), SHOWN)
    layers = np.array([row["layer"] for row in rows])
    return [
        Heatmap(
            "weights",
            "Token weights by layer",
            f"The first {length} positions, mean over {counted(len(weights), 'prompt')}; each prompt and layer "
            "is scaled alone.",
            mean([w[:, :length] for w in weights]),
            "weight",
            x_label="position",
        ),
        Lines(
            "pressed",
            "Tokens that the scale hardly tells apart",
            "Share of the tokens beside the heaviest whose weight lies in the lowest twentieth of the scale, mean over "
            f"{counted(len(weights), 'prompt')}.",
            (Series("share of tokens", layers, np.array([row["pressed"] for row in rows]), emphasis=True),),
            "layer",
            "share",
        ),
    ]
