"""How `visual-tokens` says and draws what it found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sinklens.core.counts import counted
from sinklens.core.figures import Figure, Lines, Series
from sinklens.core.pictures import CellClass, PictureMap, Quantity
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord

from .pictured import spans_of, visual_positions
from .pictures import page
from .visual_classes import ALIVE, CLASSES, Named, NamedCluster, Values

FEW = 100

UNITS = {
    "prompt": "index of the prompt",
    "image": "which picture of the prompt",
    "row": "of the grid of tokens",
    "col": "of the grid of tokens",
    "position": "token position",
    "norm": "L2 norm where it enters the first block",
    "share": "attention from the text after the picture, mean over queries, heads and layers",
    "nearest": "vocabulary token with the nearest input embedding",
}
LABELS = {
    "cls": "class",
    "image": "picture",
    "n_visual": "visual tokens",
    "text_norm": "mean norm of other tokens",
    "share_sink": "sink tokens",
    "share_dead": "dead tokens",
    "share_alive": "alive tokens",
    "vit_sink_share": "of these, sinks of the vision tower",
    "llm_sink_share": "of these, sinks of the language model",
    "attention_sink": "attention on sinks, of that on pictures",
    "attention_dead": "attention on dead tokens",
    "attention_alive": "attention on alive tokens",
    "norm_sink": "mean norm of sinks",
    "norm_dead": "mean norm of dead tokens",
    "norm_alive": "mean norm of alive tokens",
    "overlaps": "tokens of more than one class",
    "recurring_clusters": "directions that recur",
    "unnamed_clusters": "of these, neither sink nor dead",
}
_MARKS = {"sink": "ring", "dead": "cross", "alive": "dot"}
_MEANINGS = {
    "sink": "the same in most pictures, and like the first token or a norm outlier of the vision tower",
    "dead": "the same in most pictures, hardly changed and little attended",
    "alive": "of this picture",
}


def verdict(summary: dict[str, Any], recipe: str) -> str:
    """Shares of the classes, or why there is one class only."""
    rule = "by the given vocabulary ids" if recipe == "code" else "by directions that recur"
    if not summary["share_sink"] and not summary["share_dead"]:
        if recipe == "code":
            return f"All {summary['n_visual']} visual tokens are alive {rule}."
        if summary["recurring_clusters"]:
            n = summary["recurring_clusters"]
            return (
                f"No sink and no dead visual tokens: {n} direction{'s recur' if n > 1 else ' recurs'} in most "
                "pictures, and none is like the first token, stands out in the vision tower, or is left alone."
            )
        return f"No direction recurs in most pictures: all {summary['n_visual']} visual tokens are alive."
    parts = [f"{100 * summary[f'share_{name}']:.1f} % {name}" for name in CLASSES]
    held = summary["attention_sink"] + summary["attention_dead"]
    return (
        f"Of the visual tokens {', '.join(parts)} ({rule}); sinks and dead tokens together hold "
        f"{100 * held:.1f} % of the attention that the text gives to pictures."
    )


def notes(
    records: Sequence[PromptRecord],
    found: Sequence[Named],
    listed: int,
    clusters: Sequence[NamedCluster],
    recipe: str,
) -> list[str]:
    out = []
    if recipe == "paper" and len(records) < FEW:
        out.append(
            f"What recurs was looked for in {counted(len(records), 'prompt')} with pictures; {FEW} or more are better."
        )
    if recipe == "paper" and clusters and any(cluster.vision_norm is None for cluster in clusters):
        out.append(
            "It is not known which patches make a token, so sinks of the vision tower are not told apart."
        )
    if len(records) > listed:
        out.append(
            f"The table lists the tokens of the first {counted(listed, 'prompt')} with pictures, of {len(records)}."
        )
    if recipe == "code" and sum(named.overlaps for named in found):
        out.append("Some tokens are of more than one class; they count for the first.")
    return out


def figures(
    records: Sequence[PromptRecord], found: Sequence[Named], values: Sequence[Values]
) -> list[Figure]:
    """The classes on the pictures, and how the states of each class change through the layers."""
    drift = np.array([value.drift for value in values])
    known = ~np.isnan(drift)
    with np.errstate(invalid="ignore"):
        mean = np.where(known, drift, 0.0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)
    lines = tuple(
        Series(name, np.arange(len(mean)), mean[:, i], emphasis=name != "alive")
        for i, name in enumerate(CLASSES)
        if not np.isnan(mean[:, i]).all()
    )
    return [
        _on_pictures(records, found, values),
        Lines(
            "drift",
            "How far visual tokens move from where they enter",
            "Cosine of a token's state entering a block with its state entering the first, mean over the tokens of a "
            f"class and over {counted(len(values), 'prompt')}.",
            lines,
            "layer",
            "cosine",
        ),
    ]


def _on_pictures(
    records: Sequence[PromptRecord], found: Sequence[Named], values: Sequence[Values]
) -> PictureMap:
    pages = []
    for record, named, value in zip(records, found, values, strict=False):
        visual = visual_positions(record)
        share, norm, classes = (np.full(len(record), fill) for fill in (np.nan, np.nan, -1))
        share[visual], norm[visual] = value.received, record[sig.EMBEDDED_NORM][visual]
        classes = classes.astype(np.int64)
        classes[visual] = named.cls
        shares = tuple(
            (name, float(part)) for name, part in zip(CLASSES, np.nan_to_num(value.mass), strict=True)
        )
        counts = [int((named.cls == i).sum()) for i in range(len(CLASSES))]
        said = f"{counts[0]} sink, {counts[1]} dead and {counts[ALIVE]} alive tokens among the prompt's {len(visual)}."
        for picture in range(len(spans_of(record).pictures)):
            pages.append(page(record, picture, [share, norm], classes, sentence=said, bars=shares))
    return PictureMap(
        "classes",
        "Sink, dead and alive tokens",
        "Attention from the text after the picture, mean over its queries, heads and layers; norm where a token enters "
        "the first block.",
        tuple(pages),
        (
            Quantity("share", "Attention received", "share", log=True),
            Quantity("norm", "Norm", "L2 norm", drawn=False),
        ),
        tuple(CellClass(name, _MARKS[name], _MEANINGS[name]) for name in CLASSES),
        bars_title="Attention of the text on the picture",
    )
