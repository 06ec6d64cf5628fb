"""Image-centric heads: heads that look at the picture itself and not at its sinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from sinklens.core.counts import counted, verb
from sinklens.core.errors import UsageError
from sinklens.core.figures import Figure, Heatmap, Tile
from sinklens.core.papers import VISUAL_SINKS
from sinklens.tracers import signals as sig
from sinklens.tracers.signals_visual import MASS_FLOORS, SHARE_BINS
from sinklens.tracers.trace import PromptRecord, Trace

from .base import Analyzer, Finding, Status, registry
from .visual import NO_PICTURES, VISUAL, VISUAL_SINK, no_rule, rule_of, sources_of, with_pictures

OWN_RHO = {"paper": 0.8, "code": 0.5}
PerHead = Float[np.ndarray, "layer head"]


@registry.register("image-centric-heads")
@dataclass(frozen=True)
class ImageCentricHeads(Analyzer):
    """Heads in which the text reads visual tokens that are no sinks.

    How it is computed: for every layer, head and query of the text after the picture, the visual non-sink ratio r is
    the part of the query's attention on visual tokens that goes to those that are no sinks of the layer. A query is
    selected in a head if it puts at least `floor` on visual tokens and r is at least rho; heads differ from one query
    to the next. The share of selected queries is taken per prompt and then averaged over prompts; nothing is averaged
    over heads or queries before a ratio is formed. Image-centric are heads whose share reaches `min_queries`.

    Compared with the paper: recipe="paper" takes rho as the least non-sink ratio (0.8 for general tasks; the paper has
    0.5 for hallucination and 0.9 for vision-centric ones) and all layers but the last, which VAR leaves alone; a layer
    without a visual sink has r = 1 by the formula, so there the mass alone decides. recipe="code" is the official
    program: rho is the largest sink part (its 0.5 is a non-sink ratio of 0.5, and the paper's 0.8 would be 0.2), the
    first two layers are left out, and a layer without a visual sink selects nothing. The program adds 1e-6 to every
    weight of the denominator, which is left out here. What makes a head image-centric over a whole prompt is ours.

    When not to trust it: sinks are those of the run (dims and tau as its manifest has them), whatever another analyzer
    was told later. Queries that attend to a mark before the picture put little on it and are not selected. Models
    whose sliding window does not reach back to the picture give no mass in those layers.

    Args:
        floor: Least mass on visual tokens: 0, 0.1, 0.2, 0.3 or 0.5.
        rho: In steps of 0.05; 0 takes the recipe's own.
        min_queries: Share of the text queries that makes a head image-centric.
    """

    floor: float = 0.2
    rho: float = 0.0
    min_queries: float = 0.5
    recipe: Literal["paper", "code"] = "paper"

    name = "image-centric-heads"
    title = "Image-centric heads"
    place = 15
    of_pictures = True
    formula = (
        '<math display="block"><msub><mi>r</mi><mi>i</mi></msub><mo>=</mo><mfrac><mrow><munder><mo>∑</mo>'
        "<mrow><mi>j</mi>"
        "<mo>∈</mo><mi>V</mi><mo>∖</mo><mi>S</mi></mrow></munder><msub><mi>α</mi><mrow><mi>i</mi><mi>j</mi></mrow></msub>"
        "</mrow><mrow><munder><mo>∑</mo><mrow><mi>j</mi><mo>∈</mo><mi>V</mi></mrow></munder><msub><mi>α</mi><mrow><mi>i"
        "</mi><mi>j</mi></mrow></msub></mrow></mfrac><mo>≥</mo><mi>ρ</mi></math>"
    )
    needs = frozenset(
        {sig.NONSINK_RATIO, sig.NONSINK_RATIO_MEAN, sig.KEY_CLASS_MASS, sig.KEY_CLASS_COUNT, sig.VISUAL_MASS}
    )
    summarises = (
        "n_prompts", "n_queries", "n_heads", "heads_in_all", "selected_mean", "selected_max",
        "selected_max_layer", "selected_max_head", "least_ratio", "layers_with_visual_sinks",
    )  # fmt: skip
    reference = VISUAL_SINKS.at("selecting image-centric heads: visual non-sink ratio, Eq. 3")

    def __post_init__(self) -> None:
        if self.recipe not in OWN_RHO:
            raise UsageError(
                f"Unknown recipe {self.recipe!r} of image-centric-heads.", detail="It has: paper, code."
            )
        if self.floor not in MASS_FLOORS:
            raise UsageError(
                f"image-centric-heads has no counts for a floor of {self.floor:g}.",
                detail=f"Traces count by mass from {', '.join(f'{floor:g}' for floor in MASS_FLOORS)} on.",
            )
        if not 0 <= self.rho <= 1 or abs(self.rho * SHARE_BINS - round(self.rho * SHARE_BINS)) > 1e-6:
            raise UsageError(
                f"rho of image-centric-heads is a share in steps of {1 / SHARE_BINS:g}, got {self.rho:g}."
            )

    @property
    def least_ratio(self) -> float:
        """Least visual non-sink ratio, whichever way the recipe states it."""
        rho = self.rho or OWN_RHO[self.recipe]
        return rho if self.recipe == "paper" else 1.0 - rho

    def analyze(self, trace: Trace) -> Finding:
        records = with_pictures(trace)
        if not records:
            return self.not_applicable(NO_PICTURES)
        rule = rule_of(trace)
        reason = no_rule(rule)
        if rule is None or reason is not None:
            return self.not_applicable(reason or "")
        records = [record for record in records if sig.NONSINK_RATIO.name in record.arrays]
        if not records:
            return self.not_applicable("no text follows a picture, or its attention could not be seen.")
        selected = mean_known([self.selected(record) for record in records])
        mass = mean_known(
            [record[sig.KEY_CLASS_MASS][..., [VISUAL, VISUAL_SINK]].sum(-1) for record in records]
        )
        at = MASS_FLOORS.index(self.floor)
        ratio = mean_known([record[sig.NONSINK_RATIO_MEAN][..., at] for record in records])
        sinks = np.mean([record[sig.KEY_CLASS_COUNT][:, VISUAL_SINK] for record in records], axis=0)
        rows = _rows(selected, ratio, mass, sinks, self.min_queries)
        summary = self._summary(records, selected, rows, sinks)
        return self.finding(
            Status.FOUND if rows else Status.NOT_FOUND,
            self._verdict(summary, sources_of(rule.dims)),
            rows=rows,
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=self._figures(selected, ratio, mass, rows, len(records)),
            tiles=[
                Tile(
                    self.title,
                    f"{len(rows)} of {summary['heads_in_all']}",
                    "read visual non-sinks",
                    link=self.name,
                )
            ],
            notes=self._notes(sinks),
        )

    def selected(self, record: PromptRecord) -> PerHead:
        """Share of the text queries of a prompt that are selected in each head; NaN in layers left out."""
        counts = record[sig.NONSINK_RATIO].astype(np.float64)
        # Queries without any mass on visual tokens are in no bin of the ratio, and are queries all the same.
        queries = record[sig.VISUAL_MASS].astype(np.float64).sum(-1)
        first = round(self.least_ratio * SHARE_BINS)
        chosen = counts[:, :, MASS_FLOORS.index(self.floor) :, first:].sum((2, 3))
        share = np.where(queries > 0, chosen / np.maximum(queries, 1), np.nan)
        if self.recipe == "paper":
            share[-1] = np.nan
            return share
        share[record[sig.KEY_CLASS_COUNT][:, VISUAL_SINK] == 0] = 0.0
        share[:2] = np.nan
        return share

    def _summary(
        self, records: list[PromptRecord], selected: PerHead, rows: list[dict[str, Any]], sinks: np.ndarray
    ) -> dict[str, Any]:
        known = ~np.isnan(selected)
        best = np.unravel_index(np.nanargmax(np.where(known, selected, -1.0)), selected.shape)
        return {
            "n_prompts": len(records),
            "n_queries": int(sum(record[sig.VISUAL_MASS][-1, 0].sum() for record in records)),
            "n_heads": len(rows),
            "heads_in_all": int(known.sum()),
            "selected_mean": float(np.nanmean(selected)) if known.any() else None,
            "selected_max": float(selected[best]) if known.any() else None,
            "selected_max_layer": int(best[0]),
            "selected_max_head": int(best[1]),
            "least_ratio": self.least_ratio,
            "layers_with_visual_sinks": int((sinks > 0).sum()),
        }

    def _verdict(self, summary: dict[str, Any], dims: str) -> str:
        rule = (
            f"at least {100 * self.floor:.0f} % of the attention on visual tokens, of it at least "
            f"{100 * self.least_ratio:.0f} % on those that are no sinks"
        )
        mean = f"{100 * (summary['selected_mean'] or 0.0):.1f} % of all head-query pairs are selected"
        where = f"layer {summary['selected_max_layer']}, head {summary['selected_max_head']}"
        if not summary["n_heads"]:
            top = 100 * (summary["selected_max"] or 0.0)
            return (
                f"No image-centric head: nowhere do {100 * self.min_queries:.0f} % of the text queries have "
                f"{rule}; the most "
                f"is {top:.0f} % ({where}). {mean}. Sink {dims}."
            )
        many = summary["n_heads"] > 1
        return (
            f"{summary['n_heads']} of {summary['heads_in_all']} heads {'are' if many else 'is'} image-centric: "
            f"{100 * self.min_queries:.0f} % of the text queries or more have {rule}; most in {where}. "
            f"{mean}. Sink {dims}."
        )

    def _notes(self, sinks: np.ndarray) -> list[str]:
        without = int((sinks == 0).sum())
        if not without:
            return []
        rule = (
            "the ratio is 1 there and the mass alone decides"
            if self.recipe == "paper"
            else "nothing is selected there"
        )
        return [
            f"{without} of {len(sinks)} layers {verb(without, 'has', 'have')} no visual sink in any prompt: {rule}."
        ]

    def _figures(
        self, selected: PerHead, ratio: PerHead, mass: PerHead, rows: list[dict[str, Any]], prompts: int
    ) -> list[Figure]:
        marks = tuple((row["layer"], row["head"]) for row in rows)
        return [
            Heatmap(
                "selected",
                "Text queries selected, by head",
                f"Share of the text queries with at least {self.floor:g} on visual tokens and a non-sink "
                "ratio of at least "
                f"{self.least_ratio:g}, per prompt, then mean over {counted(prompts, 'prompt')}; rings: "
                "image-centric heads. "
                "Hatched: layers left out.",
                selected,
                "share",
                marks=marks,
                limits=(0.0, 1.0),
            ),
            Heatmap(
                "ratio",
                "Visual non-sink ratio, by head",
                f"Mean over the text queries with at least {self.floor:g} on visual tokens, then over "
                f"{counted(prompts, 'prompt')}. "
                "Hatched: no such query.",
                ratio,
                "share",
                limits=(0.0, 1.0),
            ),
            Heatmap(
                "mass",
                "Attention of the text on visual tokens, by head",
                f"Sinks included; mean over the text queries, then over {counted(prompts, 'prompt')}.",
                mass,
                "share",
                limits=(0.0, 1.0),
            ),
        ]


UNITS = {
    "selected": "share of the text queries, mean over prompts",
    "ratio": "part of the attention on visual tokens that goes to non-sinks, mean over queries above the floor",
    "mass": "attention on visual tokens, mean over text queries and prompts",
    "visual_sinks": "visual sinks of the layer, mean over prompts",
}
LABELS = {
    "selected": "queries selected",
    "ratio": "non-sink ratio",
    "mass": "attention on visual tokens",
    "n_queries": "text queries",
    "n_heads": "image-centric heads",
    "heads_in_all": "heads looked at",
    "selected_mean": "head-query pairs selected",
    "selected_max": "largest share of a head",
    "selected_max_layer": "in layer",
    "selected_max_head": "head",
    "least_ratio": "least non-sink ratio",
    "rho": "ρ, 0 for the recipe's own",
    "floor": "least mass on visual tokens",
    "min_queries": "least share of queries",
}


def mean_known(values: list[Float[np.ndarray, "..."]]) -> Float[np.ndarray, "..."]:
    """Mean over prompts of what is known, NaN where nothing is."""
    stacked = np.array(values, dtype=np.float64)
    known = ~np.isnan(stacked)
    total = np.where(known, stacked, 0.0).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)


def _rows(
    selected: PerHead, ratio: PerHead, mass: PerHead, sinks: np.ndarray, least: float
) -> list[dict[str, Any]]:
    places = np.argwhere(np.nan_to_num(selected, nan=-1.0) >= least)
    rows = [
        {
            "layer": int(layer),
            "head": int(head),
            "selected": float(selected[layer, head]),
            "ratio": None if np.isnan(ratio[layer, head]) else float(ratio[layer, head]),
            "mass": float(mass[layer, head]),
            "visual_sinks": float(sinks[layer]),
        }
        for layer, head in places
    ]
    return sorted(rows, key=lambda row: (-row["selected"], row["layer"], row["head"]))
