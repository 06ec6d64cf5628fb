"""What visual-sinks draws: sinks per layer, the histogram of φ, and maps of φ over pictures."""

from __future__ import annotations

import numpy as np

from sinklens.core.figures import Figure, Heatmap, Lines, Series
from sinklens.tracers.sink_dims import Cut

from .visual import Pictured

BINS, MAPS = 40, 3


def draw(seen: list[Pictured], cut: Cut, layer: int) -> list[Figure]:
    """Everything that is drawn of visual sinks.

    Args:
        layer: The one with the most visual sinks, which the maps show.
    """
    return [_counts(seen, cut), _histogram(seen, cut), *_maps(seen, cut, layer)]


def _counts(seen: list[Pictured], cut: Cut) -> Lines:
    visual = np.mean([item.visual_sinks().sum(1) for item in seen], axis=0)
    text = np.mean([item.text_sinks().sum(1) for item in seen], axis=0)
    layers = np.arange(len(visual))
    return Lines(
        "counts",
        "Sinks per prompt by layer",
        f"Tokens with φ of at least {cut.tau:.3g} in the state that enters the layer, mean over {len(seen)} prompts "
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
        f"Visual tokens of all layers and {len(seen)} prompts by φ; the line is the threshold.{missing}",
        (Series("visual tokens", (edges[:-1] + edges[1:]) / 2, np.where(counts > 0, counts, np.nan)),),
        "φ",
        "tokens",
        log_y=True,
        bars=True,
        marks=((cut.tau, f"τ = {cut.tau:.3g}"),),
    )


def _maps(seen: list[Pictured], cut: Cut, layer: int) -> list[Heatmap]:
    """φ over the views of the pictures with the most sinks; each picture alone, nothing is averaged."""
    ranked = sorted(seen, key=lambda item: -int(item.visual_sinks()[layer].sum()))[:MAPS]
    maps = []
    for item in ranked:
        for index, grid in enumerate(item.spans.grids):
            name = item.spans.pictures[grid.picture].name
            sinks = grid.spread(item.sinks[layer], fill=0.0) > 0
            maps.append(
                Heatmap(
                    f"phi_{item.record.index}_{index}",
                    f"φ over {name}, layer {layer}",
                    f"φ of the visual tokens of prompt {item.record.index} ({grid.view}) where layer {layer} begins, "
                    f"laid out on the picture; rings: sinks (φ of at least {cut.tau:.3g}).",
                    grid.spread(item.phi[layer]),
                    "ratio",
                    y_label="row",
                    x_label="column",
                    marks=tuple((int(r), int(c)) for r, c in np.argwhere(sinks)),
                )
            )
    return maps
