"""Gaze shift: which visual tokens attention turns to as the text is read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sinklens.core.counts import counted
from sinklens.core.errors import UsageError
from sinklens.core.figures import Figure
from sinklens.core.papers import GAZE_SHIFTS
from sinklens.core.pictures import PictureMap, Quantity
from sinklens.tracers import signals_pictures as pic
from sinklens.tracers.trace import PromptRecord, Trace

from .base import Analyzer, Finding, Status, registry
from .pictured import cells_of, spans_of, text_received, visual_positions, why_none, with_pictures
from .pictures import page

DEPTH = 11 / 32


@registry.register("gaze-shift")
@dataclass(frozen=True)
class GazeShift(Analyzer):
    """Which visual tokens attention turns to from one word to the next: a map in which static sinks cancel.

    How it is computed: for each text query and the one before it, the rise of the attention to each visual token, falls
    counting as 0; mean over the queries and over the half of the heads whose rises sum to most. One layer is taken
    (`layer`, or by default 11 of 32 and the same part of other depths), values are clamped to three standard deviations
    around the mean and stretched to 0 to 1. Found means that the map departs from the attention itself: the rank
    correlation of the two is below `apart`.

    Compared with the paper: it takes content words only, by a tagger; here every token of text after the picture is a
    query, so no tagger is needed. Its layers are 11 (LLaVA-1.5-7B), 10 (13B) and 14 (Qwen2-VL-7B). The code finds the
    queries by offsets into a template; here they are those whose predecessor is text too. What it does with the map,
    amplifying attention, is no part of this. The condition for found is ours.

    When not to trust it: a prompt of one or two words has few differences. A token that one word attends to and the
    next does not, over and over, counts however meaningless.

    Args:
        layer: Which layer; -1 takes 11 of 32.
        apart: Rank correlation with the attention below which the map says something else.
        pictures: Prompts that are drawn and listed.
    """

    layer: int = -1
    apart: float = 0.7
    pictures: int = 16

    name = "gaze-shift"
    title = "Gaze shift"
    place = 73
    default = False
    of_pictures = True
    formula = (
        '<math display="block"><msub><mi>g</mi><mi>v</mi></msub><mo>=</mo><mi>mean</mi><mo>(</mo><mi>max</mi><mo>(</mo>'
        "<mn>0</mn><mo>,</mo><msub><mi>A</mi><mrow><mi>q</mi><mi>v</mi></mrow></msub><mo>-</mo><msub><mi>A</mi><mrow>"
        "<mi>q</mi><mo>-</mo><mn>1</mn><mo>,</mo><mi>v</mi></mrow></msub><mo>)</mo><mo>)</mo></math>"
    )
    needs = frozenset({pic.GAZE_SHIFT, pic.QUERIES_RECEIVED, pic.QUERIES_VISIBLE})
    summarises = ("layer", "agreement", "n_prompts")
    reference = GAZE_SHIFTS.at("gaze shift saliency; inference.py, lines 210-258")

    def analyze(self, trace: Trace) -> Finding:
        reason = why_none(trace, *(self.needs - {pic.GAZE_SHIFT}))
        if reason:
            return self.not_applicable(reason)
        layers = len(trace.layers)
        if not -1 <= self.layer < layers:
            raise UsageError(f"gaze-shift: there is no layer {self.layer}; the model has {layers}.")
        layer = self.layer if self.layer >= 0 else min(layers - 1, round(DEPTH * layers))
        records = [
            record
            for record in with_pictures(trace, *self.needs)
            if np.isfinite(record[pic.GAZE_SHIFT][layer]).all() and len(visual_positions(record)) > 2
        ]
        if not records:
            return self.not_applicable(
                "it needs two words in a row after a picture, and a layer with attention."
            )
        raw = [record[pic.GAZE_SHIFT][layer].astype(np.float64) for record in records]
        shares = [text_received(record)[layer, visual_positions(record)] for record in records]
        agreement = float(np.mean([rank_correlation(g, s) for g, s in zip(raw, shares, strict=True)]))
        maps = [stretched(values) for values in raw]
        rows = []
        for record, values, given, share in list(zip(records, maps, raw, shares, strict=True))[
            : self.pictures
        ]:
            rows += [
                {
                    "prompt": record.index,
                    "image": cell.image,
                    "row": cell.row,
                    "col": cell.col,
                    "position": cell.position,
                    "saliency": float(values[cell.place]),
                    "rise": float(given[cell.place]),
                    "share": float(share[cell.place]),
                }
                for cell in cells_of(record)
            ]
        return self.finding(
            Status.FOUND if agreement < self.apart else Status.NOT_FOUND,
            f"In layer {layer}, what the text turns to and what it looks at have a rank correlation of {agreement:.2f} "
            f"over the visual tokens (mean over {counted(len(records), 'prompt')}).",
            rows=sorted(rows, key=lambda row: -row["rise"]),
            summary={"layer": layer, "agreement": agreement, "n_prompts": len(records)},
            units=UNITS,
            labels=LABELS,
            figures=[_figure(records[: self.pictures], maps, shares, layer)],
        )


def stretched(values: Float[np.ndarray, " visual"]) -> Float[np.ndarray, " visual"]:
    """Clamped to the mean and three standard deviations, then stretched to 0 to 1; 0 where nothing differs."""
    mean, spread = values.mean(), values.std()
    clamped = np.clip(values, mean - 3 * spread, mean + 3 * spread)
    extent = clamped.max() - clamped.min()
    return (clamped - clamped.min()) / extent if extent > 0 else np.zeros(len(values))


def amplification(saliency: Float[np.ndarray, " visual"], alpha: float = 5.0) -> Float[np.ndarray, " visual"]:
    """exp(alpha g): what the paper multiplies attention by; 5 for LLaVA, 4 for Qwen2-VL."""
    return np.exp(alpha * saliency)


def rank_correlation(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Spearman's; 0 where one does not vary."""
    from scipy.stats import rankdata

    x, y = rankdata(a), rankdata(b)
    if x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


UNITS = {
    "saliency": "rise, clamped and stretched to 0 to 1 within the prompt",
    "rise": "mean rise of the attention from one text query to the next",
    "share": "attention from the text in that layer, mean over queries and heads",
}
LABELS = {"image": "picture", "agreement": "rank correlation with the attention"}


def _figure(
    records: list[PromptRecord], maps: list[np.ndarray], shares: list[np.ndarray], layer: int
) -> Figure:
    pages = []
    for record, values, share in zip(records, maps, shares, strict=False):
        laid = np.full((2, len(record)), np.nan)
        laid[:, visual_positions(record)] = values, share
        pages += [page(record, i, list(laid)) for i in range(len(spans_of(record).pictures))]
    return PictureMap(
        "shift",
        f"What the text turns to, layer {layer}",
        "Rise of the attention from one text query to the next, mean over queries and half of the heads, "
        "stretched to 0 "
        "to 1; beside it the attention, mean over queries and heads.",
        tuple(pages),
        (
            Quantity("saliency", "Gaze shift", "0 to 1", limits=(0.0, 1.0)),
            Quantity("share", "Attention", "share", log=True),
        ),
    )
