"""What vision-tower-sinks draws: norms and sinks block by block, attention to them, and where they are."""

from __future__ import annotations

from typing import Any

import numpy as np

from sinklens.core.figures import Figure, Heatmap, Lines, Series

from .vision_tower import Tower, attention_ratios


def draw(seen: list[Tower], rows: list[dict[str, Any]]) -> list[Figure]:
    layers = np.arange(len(seen[0].norms))
    median = np.mean([np.median(item.norms[:, item.patches], axis=1) for item in seen], axis=0)
    largest = np.mean([item.norms[:, item.patches].max(1) for item in seen], axis=0)
    counts = np.mean([item.tokens().sum(1) for item in seen], axis=0)
    figures: list[Figure] = [
        Lines(
            "norms",
            "Norms in the vision tower",
            f"Largest and median norm over the patches of a prompt after each block, mean over {len(seen)} prompts.",
            (Series("largest", layers, largest, emphasis=True), Series("median", layers, median)),
            "block of the vision tower",
            "L2 norm",
            log_y=True,
            marks=((float(seen[0].block), "given to the language model"),),
        ),
        Lines(
            "counts",
            "Sinks of the vision tower by block",
            f"Visual tokens that hold an outlying patch, per prompt; mean over {len(seen)} prompts.",
            (Series("tokens", layers, counts, emphasis=True),),
            "block of the vision tower",
            "tokens per prompt",
        ),
    ]
    ratios = attention_ratios(seen)
    if ratios is not None:
        figures.append(
            Lines(
                "attention",
                "Attention of the text to sinks of the vision tower",
                "Per token, over that to another visual token, by layer of the language model; mean over prompts.",
                (Series("sinks over others", np.arange(len(ratios)), ratios, emphasis=True),),
                "layer",
                "ratio",
            )
        )
    if rows:
        figures += _maps(next(item for item in seen if item.record.index == rows[0]["prompt"]))
    return figures


def _maps(item: Tower) -> list[Heatmap]:
    """The largest norm of each token's patches, on the grids of one prompt."""
    maps = []
    tokens, norm = item.tokens()[item.block], item.norms[item.block]
    for index, grid in enumerate(item.spans.grids):
        assert grid.members is not None
        values = np.where(grid.members >= 0, norm[np.maximum(grid.members, 0)], -np.inf).max(-1)
        values = np.where(np.isfinite(values), values, np.nan)
        marked = grid.spread(tokens, fill=0.0) > 0
        name = item.spans.pictures[grid.picture].name
        maps.append(
            Heatmap(
                f"norm_{item.record.index}_{index}",
                f"Norm in the vision tower over {name}",
                f"Largest norm of the patches of each token of prompt {item.record.index} ({grid.view}) after block "
                f"{item.block}; rings: sinks.",
                values,
                "L2 norm",
                y_label="row",
                x_label="column",
                marks=tuple((int(r), int(c)) for r, c in np.argwhere(marked)),
            )
        )
    return maps
