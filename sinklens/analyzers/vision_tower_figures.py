"""What vision-tower-sinks draws: norms and sinks block by block, attention to them, and where they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool

from sinklens.core.counts import counted
from sinklens.core.figures import Figure, Lines, Series
from sinklens.core.pictures import CellClass, PictureMap, PicturePage, Quantity

from .pictures import page
from .vision_tower import Tower, attention_ratios

TOWER, BOTH, LLM = 0, 1, 2


def draw(
    seen: list[Tower], rows: list[dict[str, Any]], crossed: list[Bool[np.ndarray, " pos"]] | None, rule: str
) -> list[Figure]:
    """Everything that is drawn.

    Args:
        crossed: Which tokens are sinks of the language model, per prompt; None where that is not known.
        rule: What makes a patch a sink, as in "a patch with a norm of at least 100".
    """
    layers = np.arange(len(seen[0].norms))
    median = np.mean([np.median(item.norms[:, item.patches], axis=1) for item in seen], axis=0)
    largest = np.mean([item.norms[:, item.patches].max(1) for item in seen], axis=0)
    counts = np.mean([item.tokens().sum(1) for item in seen], axis=0)
    figures: list[Figure] = [
        Lines(
            "norms",
            "Norms in the vision tower",
            "Largest and median norm over the patches of a prompt after each block, mean over "
            f"{counted(len(seen), 'prompt')}.",
            (Series("largest", layers, largest, emphasis=True), Series("median", layers, median)),
            "block of the vision tower",
            "L2 norm",
            log_y=True,
            marks=((float(seen[0].block), "given to the language model"),),
        ),
        Lines(
            "counts",
            "Sinks of the vision tower by block",
            f"Visual tokens that hold an outlying patch, per prompt; mean over {counted(len(seen), 'prompt')}.",
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
    return [patches(seen, crossed, rule), *figures] if rows else figures


def patches(seen: list[Tower], crossed: list[Bool[np.ndarray, " pos"]] | None, rule: str) -> PictureMap:
    """Every picture with the norms of its patches and the tokens that hold an outlier; most of them first."""
    pages = []
    for index, item in enumerate(seen):
        llm = np.zeros(len(item.record), dtype=bool) if crossed is None else crossed[index]
        tower = item.tokens()[item.block]
        classes = np.where(tower & llm, BOTH, np.where(tower, TOWER, np.where(llm, LLM, -1)))
        for picture in range(len(item.spans.pictures)):
            built = page(item.record, picture, [item.largest()], classes)
            counted = [_number(built, of) for of in (TOWER, BOTH, LLM)]
            said = _sentence(counted, rule, known=crossed is not None)
            pages.append((counted[TOWER] + counted[BOTH], replace(built, sentence=said)))
    pages.sort(key=lambda one: -one[0])
    block = seen[0].block
    classes = (
        CellClass("sink of the vision tower", "ring", rule),
        CellClass("sink of both", "diamond", "also a visual sink of the language model, in some layer"),
        CellClass("sink of the language model only", "dot", "a visual sink in some layer"),
    )
    return PictureMap(
        "patches",
        f"Sinks of the vision tower on their pictures, block {block}",
        f"Largest norm of the patches of each token after block {block} of the vision tower; pictures with most "
        "sinks stand first.",
        tuple(built for _, built in pages),
        (Quantity("norm", "Norm in the vision tower", "L2 norm", log=True),),
        classes if crossed is not None else classes[:1],
    )


def _number(built: PicturePage, of: int) -> int:
    """Cells of a page that are of a class."""
    return sum(int((np.asarray(grid.classes) == of).sum()) for grid in built.grids)


def _sentence(counted: list[int], rule: str, *, known: bool) -> str:
    tower, both, llm = counted
    found = tower + both
    text = f"No token of this picture holds a patch with a {rule}."
    if found:
        many = found > 1
        text = f"{found} token{'s' * many} of this picture hold{'' if many else 's'} a patch with a {rule}."
    if not known:
        return text
    others = f"{llm}{' other' * bool(both)} visual sink{'s' * (llm != 1)} of the language model"
    shared = (
        f" {both} of {found} {'is one' if both == 1 else 'are'} of the language model too;" if found else ""
    )
    return f"{text}{shared} {'it' if shared else 'The picture'} has {others}."
