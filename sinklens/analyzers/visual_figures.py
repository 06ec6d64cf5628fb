"""What visual-sinks draws: the pictures with their sinks, sinks per layer, and the histogram of φ."""

from __future__ import annotations

import numpy as np

from sinklens.core.counts import counted
from sinklens.core.figures import Figure, Lines, Series
from sinklens.tracers.sink_dims import Cut

from .visual import Pictured
from .visual_map import patches

BINS = 40


def draw(seen: list[Pictured], cut: Cut, layer: int) -> list[Figure]:
    """Everything that is drawn of visual sinks.

    Args:
        layer: The one with the most visual sinks, which the pictures show.
    """
    return [patches(seen, cut, layer), _counts(seen, cut), _histogram(seen, cut)]


def _counts(seen: list[Pictured], cut: Cut) -> Lines:
    visual = np.mean([item.visual_sinks().sum(1) for item in seen], axis=0)
    text = np.mean([item.text_sinks().sum(1) for item in seen], axis=0)
    layers = np.arange(len(visual))
    return Lines(
        "counts",
        "Sinks per prompt by layer",
        f"Tokens with φ of at least {cut.tau:.3g} in the state that enters the layer, mean over "
        f"{counted(len(seen), 'prompt')} "
        "with pictures.",
        (Series("visual sinks", layers, visual, emphasis=True), Series("text sinks", layers, text)),
        "layer",
        "tokens per prompt",
    )


def _histogram(seen: list[Pictured], cut: Cut) -> Lines:
    values = np.concatenate([item.phi[:, item.visual].ravel() for item in seen])
    known = values[~np.isnan(values)]
    top = max(float(known.max(initial=0.0)), cut.tau) * 1.05
    counts, edges = np.histogram(known, BINS, (0.0, top))
    lost = len(values) - len(known)
    missing = f" {lost} with φ too small to be kept are left out." if lost else ""
    return Lines(
        "histogram",
        "Distribution of φ over the visual tokens",
        f"Visual tokens of all layers and {counted(len(seen), 'prompt')} by φ; the line is the threshold.{missing}",
        (Series("visual tokens", (edges[:-1] + edges[1:]) / 2, np.where(counts > 0, counts, np.nan)),),
        "φ",
        "tokens",
        log_y=True,
        bars=True,
        marks=((cut.tau, f"τ = {cut.tau:.3g}"),),
    )
