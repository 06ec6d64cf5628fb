"""Attention divergence: how many visual tokens could go at a fixed loss of attention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from sinklens.core.counts import counted
from sinklens.core.errors import UsageError
from sinklens.core.figures import Lines, Series
from sinklens.core.reference import Reference
from sinklens.tracers import signals_pictures as pic
from sinklens.tracers.trace import Trace

from .base import Analyzer, Finding, Status, registry
from .pictured import why_none, with_pictures


@registry.register("attention-divergence")
@dataclass(frozen=True)
class AttentionDivergence(Analyzer):
    """How many visual tokens each layer could lose without losing more than a part of the attention on pictures.

    How it is computed: per layer two distributions over the visual tokens: the largest weight of any head, mean over
    the text queries, and the same over the visual queries. Tokens are taken away from the smallest on as long as what
    is left holds at least 1 - `loss` of the sum, for each distribution by itself; removable are the tokens that both
    would lose. The share is averaged over prompts. Found means that some layer could lose at least half.

    Compared with the paper: FitPrune removes layer by layer, relative to what the layers before left, and finds the
    loss that meets a target of computation by bisection; here every layer is asked by itself at one loss, which the
    pruner is built on. The published code takes the largest head too, and ranks by the product of the two.

    When not to trust it: attention is no proof of use, and sinks take a part of it: removing them frees none for the
    others. Tokens are removable on average; which ones differs by picture.

    Args:
        loss: Part of the attention that may go.
    """

    loss: float = 0.1

    name = "attention-divergence"
    title = "Attention divergence"
    place = 79
    default = False
    of_pictures = True
    formula = (
        '<math display="block"><mi>R</mi><mo>=</mo><msub><mi>R</mi><mtext>text</mtext></msub><mo>∩</mo><msub><mi>R</mi>'
        "<mtext>visual</mtext></msub><mo>,</mo><munder><mo>∑</mo><mrow><mi>j</mi><mo>∈</mo><mi>R</mi></mrow></munder>"
        "<msub><mi>a</mi><mi>j</mi></msub><mo>≤</mo><mi>α</mi></math>"
    )
    needs = frozenset({pic.HEAD_MAX_RECEIVED})
    summarises = ("n_prompts", "most", "most_layer")
    reference = Reference(
        key="ye2024fit",
        title="Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models",
        authors="Weihao Ye and Qiong Wu and Wenhao Lin and Yiyi Zhou",
        year=2024,
        arxiv="2409.10197",
        section="attention distributions of text and visual queries; statistical_analysis.py, lines 124-342",
        code="https://github.com/ywh187/FitPrune",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.loss < 1:
            raise UsageError(f"attention-divergence: loss must be at least 0 and below 1, got {self.loss}.")

    def analyze(self, trace: Trace) -> Finding:
        reason = why_none(trace, *self.needs)
        if reason:
            return self.not_applicable(reason)
        records = with_pictures(trace, *self.needs)
        given = [record[pic.HEAD_MAX_RECEIVED].astype(np.float64) for record in records]
        known = [layer for layer in range(len(given[0])) if all(_says(one[layer]) for one in given)]
        if not known:
            return self.not_applicable("no layer has attention from text after the picture and within it.")
        rows = []
        for layer in known:
            parts = np.array([
                [removable(one[layer, 0], self.loss).mean(), removable(one[layer, 1], self.loss).mean(),
                 (removable(one[layer, 0], self.loss) & removable(one[layer, 1], self.loss)).mean()]
                for one in given
            ])  # fmt: skip
            text, visual, both = parts.mean(0)
            rows.append(
                {"layer": layer, "removable": float(both), "by_text": float(text), "by_visual": float(visual)}
            )
        most = max(rows, key=lambda row: row["removable"])
        first = (
            ""
            if most["layer"] == rows[0]["layer"]
            else f", layer {rows[0]['layer']} without {100 * rows[0]['removable']:.0f} %"
        )
        x = np.array(known)
        series = tuple(
            Series(name, x, np.array([row[key] for row in rows]), emphasis=key == "removable")
            for key, name in (
                ("removable", "both"),
                ("by_text", "text queries"),
                ("by_visual", "visual queries"),
            )
        )
        return self.finding(
            Status.FOUND if most["removable"] >= 0.5 else Status.NOT_FOUND,
            f"At a loss of {100 * self.loss:g} % of the attention, layer {most['layer']} could do without "
            f"{100 * most['removable']:.0f} % of the visual tokens{first} (mean over "
            f"{counted(len(records), 'prompt')}).",
            rows=rows,
            summary={"n_prompts": len(records), "most": most["removable"], "most_layer": most["layer"]},
            units=UNITS,
            labels=LABELS,
            figures=[
                Lines(
                    "removable",
                    "Visual tokens that could go",
                    f"Share of the visual tokens that hold the last {100 * self.loss:g} % of the attention, by which "
                    f"queries, mean over {counted(len(records), 'prompt')}.",
                    series,
                    "layer",
                    "share of visual tokens",
                )
            ],
        )


def _says(values: Float[np.ndarray, "set visual"]) -> bool:
    return bool(np.isfinite(values).all() and (values.sum(1) > 0).all())


def removable(values: Float[np.ndarray, " token"], loss: float) -> Bool[np.ndarray, " token"]:
    """The smallest values that together hold at most a part `loss` of the sum."""
    order = np.argsort(values, kind="stable")
    # Rounding must not decide about a token whose share is exactly what may go.
    gone = np.cumsum(values[order]) <= loss * values.sum() * (1 + 1e-12)
    out = np.zeros(len(values), dtype=bool)
    out[order[gone]] = True
    return out


UNITS = {
    "removable": "share of the visual tokens that both distributions could lose",
    "by_text": "share that the text queries' distribution could lose",
    "by_visual": "share that the visual queries' distribution could lose",
}
LABELS = {
    "by_text": "by text queries",
    "by_visual": "by visual queries",
    "most": "most removable",
    "most_layer": "in layer",
}
