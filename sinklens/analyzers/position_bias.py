"""Position bias: how attention to visual tokens rises with their place, whatever the picture shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sinklens.core.counts import counted, verb
from sinklens.core.errors import UsageError
from sinklens.core.figures import Figure, Lines, Series
from sinklens.core.papers import ATTENTION_DEBIASING
from sinklens.core.recency import no_outliers, recency_fit
from sinklens.tracers import signals_pictures as pic
from sinklens.tracers.trace import PromptRecord, Trace

from .base import Analyzer, Finding, Status, registry
from .pictured import spans_of, text_received, visual_positions, why_none, with_pictures

SETS = {"text": 0, "last": 1}


@registry.register("position-bias")
@dataclass(frozen=True)
class PositionBias(Analyzer):
    """How strongly the text prefers late visual tokens (recency), as the rate of an exponential.

    How it is computed: attention from the text after the picture to each visual token, mean over queries, heads and
    prompts, in raster order; f(x) = mu exp(sigma x) over x = i / T is fitted by least squares in linear space, begun
    from the fit of the logarithms. Before that, tokens further than three median deviations from the median are left
    out: a single sink decides mu and sigma otherwise. Prompts with other numbers of visual tokens are not averaged;
    the most frequent number is taken. Means by row and by column of the grid stand beside it. It is found in a layer
    where |sigma| reaches `least` and the fit explains at least half of the variance.

    Compared with the paper: it fits means over calibration pictures of the ranking score of a pruner, and divides by
    the fit. Which queries is the host pruner's choice: `queries=last` as FastV, else all text. Leaving sinks out before
    the fit, and both conditions for found, are ours. The published code ships finished weights and no fit.

    When not to trust it: few pictures leave content in the mean; objects that stand low in all pictures look like
    recency. Models whose picture attends both ways (Gemma3, PaliGemma) and pictures of several tiles have no one order;
    the fit still is of the order of their tokens.

    Args:
        queries: `text` or `last`.
        least: |sigma| that counts as a bias.
    """

    queries: str = "text"
    least: float = 0.5

    name = "position-bias"
    title = "Position bias"
    place = 76
    default = False
    of_pictures = True
    formula = (
        '<math display="block"><mi>f</mi><mo>(</mo><mi>x</mi><mo>)</mo><mo>=</mo><mi>μ</mi><msup><mi>e</mi><mrow>'
        "<mi>σ</mi><mi>x</mi></mrow></msup></math>"
    )
    needs = frozenset({pic.QUERIES_RECEIVED, pic.QUERIES_VISIBLE})
    summarises = ("n_prompts", "left_out", "n_visual", "sigma_median", "biased_layers")
    reference = ATTENTION_DEBIASING.at("position debiasing")

    def __post_init__(self) -> None:
        if self.queries not in SETS:
            raise UsageError(f"position-bias: queries must be text or last, got {self.queries!r}.")

    def analyze(self, trace: Trace) -> Finding:
        reason = why_none(trace, *self.needs)
        if reason:
            return self.not_applicable(reason)
        records = with_pictures(trace, *self.needs)
        counts = [len(visual_positions(record)) for record in records]
        size = max(set(counts), key=lambda n: (counts.count(n), n))
        if size < 4:
            return self.not_applicable("pictures of fewer than four tokens have no order to speak of.")
        same = [record for record, n in zip(records, counts, strict=True) if n == size]
        given = np.array([text_received(r, SETS[self.queries])[:, visual_positions(r)] for r in same])
        if np.isnan(given).all():
            return self.not_applicable("no text after a picture sees it.")
        mean = np.nanmean(given, axis=0)
        rows = [self._row(layer, values) for layer, values in enumerate(mean) if np.isfinite(values).all()]
        biased = [row for row in rows if row["biased"]]
        summary = {
            "n_prompts": len(same),
            "left_out": len(records) - len(same),
            "n_visual": size,
            "sigma_median": float(np.median([row["sigma"] for row in rows])),
            "biased_layers": len(biased),
        }
        strongest = max(rows, key=lambda row: (row["biased"], abs(row["sigma"])))
        return self.finding(
            Status.FOUND if biased else Status.NOT_FOUND,
            _verdict(summary, strongest, biased, len(rows)),
            rows=sorted(rows, key=lambda row: (-row["biased"], -abs(row["sigma"]))),
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=_figures(mean, same, strongest),
            notes=_notes(same, summary),
        )

    def _row(self, layer: int, values: Float[np.ndarray, " visual"]) -> dict[str, Any]:
        kept = no_outliers(values)
        mu, sigma, explained = recency_fit(values, kept)
        return {
            "layer": layer,
            "sigma": sigma,
            "mu": mu,
            "explained": explained,
            "left_out": int((~kept).sum()),
            "biased": bool(abs(sigma) >= self.least and explained >= 0.5),
        }


UNITS = {
    "sigma": "rate over the whole picture: the last token gets e^sigma times the first",
    "mu": "share that the fit gives the first token",
    "explained": "R^2 of the fit",
    "left_out": "tokens left out as outliers",
}
LABELS = {
    "sigma": "σ",
    "mu": "μ",
    "explained": "R²",
    "n_visual": "visual tokens",
    "sigma_median": "median σ of the layers",
    "left_out": "left out",
}


def _verdict(summary: dict[str, Any], row: dict[str, Any], biased: list[dict[str, Any]], layers: int) -> str:
    where = f"σ = {row['sigma']:+.2f} in layer {row['layer']} (R² {row['explained']:.2f})"
    if not summary["biased_layers"]:
        return f"No layer prefers visual tokens by their place: at most {where}."
    late = sum(item["sigma"] > 0 for item in biased)
    if 0 < late < len(biased):
        return (
            f"{late} of {layers} layers {verb(late, 'prefers', 'prefer')} late visual tokens and {len(biased) - late} "
            f"early ones: most {where}."
        )
    which = "late" if late else "early"
    prefer = verb(len(biased), "prefers", "prefer")
    return f"{len(biased)} of {layers} layers {prefer} {which} visual tokens: most {where}."


def _notes(records: list[PromptRecord], summary: dict[str, Any]) -> list[str]:
    notes = []
    if summary["left_out"]:
        notes.append(
            f"{counted(summary['left_out'], 'prompt')}"
            f" {verb(summary['left_out'], 'has', 'have')} another number of visual tokens and "
            f"{verb(summary['left_out'], 'is', 'are')} left out."
        )
    if any(len(spans_of(record).grids) > 1 for record in records):
        notes.append("Pictures of several grids: the order is that of their tokens, grid after grid.")
    if len(records) < 20:
        notes.append(
            f"The mean is over {counted(len(records), 'prompt')} only and still holds what the pictures show."
        )
    return notes


def _figures(
    mean: Float[np.ndarray, "layer visual"], records: list[PromptRecord], row: dict[str, Any]
) -> list[Figure]:
    values = mean[row["layer"]]
    x = np.arange(len(values))
    fit = row["mu"] * np.exp(row["sigma"] * x / len(x))
    figures: list[Figure] = [
        Lines(
            "order",
            f"Attention by place in the picture, layer {row['layer']}",
            f"Mean over queries, heads and {counted(len(records), 'prompt')}, in the order of the tokens, and the fit.",
            (Series("measured", x, values, emphasis=True), Series("fit", x, fit)),
            "visual token",
            "share",
        )
    ]
    grids = spans_of(records[0]).grids
    if len(grids) == 1 and (grids[0].positions >= 0).all():
        laid = values.reshape(grids[0].shape)
        figures.append(
            Lines(
                "margins",
                f"Attention by row and by column, layer {row['layer']}",
                f"Means over the rows and over the columns of the grid, {counted(len(records), 'prompt')}.",
                tuple(
                    Series(name, np.arange(len(v)), v)
                    for name, v in (("row", laid.mean(1)), ("column", laid.mean(0)))
                ),
                "row or column",
                "share",
            )
        )
    return figures
