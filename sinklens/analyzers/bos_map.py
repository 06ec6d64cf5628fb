"""BOS map: which visual tokens become like the first token of the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from sinklens.core.counts import counted, verb
from sinklens.core.figures import Figure, Lines, Series
from sinklens.core.pictures import CellClass, PictureMap, PicturePage, Quantity
from sinklens.core.reference import Reference
from sinklens.tracers import signals_pictures as pic
from sinklens.tracers.trace import PromptRecord, Trace

from .base import Analyzer, Finding, Status, registry
from .evidence import span
from .pictured import cells_of, spans_of, visual_positions, why_none, with_pictures
from .pictures import page


@registry.register("bos-map")
@dataclass(frozen=True)
class BosMap(Analyzer):
    """Which visual tokens become like the first token of the text (BOS), wherever that stands.

    How it is computed: cosine of each visual token's state with that of the first token that is neither visual nor a
    delimiter, where each block begins. A token is sink-like if the cosine exceeds `aligned` in some layer of the middle
    half of the model. It needs neither sink dims nor attention.

    Compared with the paper: Cappellazzo et al. find in audio-visual models that sinks other than BOS have states of
    high cosine to it in middle layers; 0.9 is the value by which further sinks are recognised. Which layers are middle
    is left open there. The official code computes the squared cosine for its loss; here it keeps its sign.

    When not to trust it: where all states share a narrow cone everything is aligned: read the median beside it. A model
    without BOS compares with a word.

    Args:
        aligned: Cosine above which a token is sink-like.
        pictures: Prompts that are drawn.
    """

    aligned: float = 0.9
    pictures: int = 16

    name = "bos-map"
    title = "BOS map"
    place = 74
    default = False
    of_pictures = True
    formula = (
        "<math "
        'display="block"><mi>cos</mi><mo>(</mo><msub><mi>x</mi><mrow><mi>ℓ</mi><mo>,</mo><mtext>BOS</mtext></mrow>'
        "</msub><mo>,</mo><msub><mi>x</mi><mrow><mi>ℓ</mi><mo>,</mo><mi>j</mi></mrow></msub><mo>)</mo><mo>&gt;</mo>"
        "<mn>0.9</mn></math>"
    )
    needs = frozenset({pic.VISUAL_FIRST_COSINE})
    summarises = ("n_prompts", "share", "median_largest")
    reference = Reference(
        key="cappellazzo2025mitigating",
        title="Mitigating Attention Sinks and Massive Activations in Audio-Visual Speech Recognition with LLMs",
        authors="Umberto Cappellazzo and others",
        year=2025,
        arxiv="2510.22603",
        section="cosine similarity to BOS",
    )

    def analyze(self, trace: Trace) -> Finding:
        reason = why_none(trace, *self.needs)
        if reason:
            return self.not_applicable(reason)
        records = with_pictures(trace, *self.needs)
        layers = len(records[0][pic.VISUAL_FIRST_COSINE])
        middle = slice(layers // 4, max(layers // 4 + 1, layers - layers // 4))
        rows: list[dict[str, Any]] = []
        pages, shares, medians = [], [], []
        for number, record in enumerate(records):
            cosine = record[pic.VISUAL_FIRST_COSINE].astype(np.float64)
            like = cosine[middle].max(0) > self.aligned
            shares.append(like.mean())
            medians.append(np.median(cosine, axis=1))
            rows += _rows(record, cosine, like, middle)
            if number < self.pictures:
                pages += _pages(record, cosine[middle].max(0), like)
        share, median = float(np.mean(shares)), np.mean(medians, axis=0)
        return self.finding(
            Status.FOUND if rows else Status.NOT_FOUND,
            f"{100 * share:.1f} % of the visual tokens become like the first token of the text (cosine above "
            f"{self.aligned:g}) in {span(middle.start, middle.stop - 1)}; the median visual token reaches "
            f"{median[middle].max():.2f}.",
            rows=sorted(rows, key=lambda row: -row["cosine"]),
            summary={
                "n_prompts": len(records),
                "share": share,
                "median_largest": float(median[middle].max()),
            },
            units={
                "cosine": "largest cosine with the first token of the text in the middle layers",
                "layer": "there",
            },
            labels={
                "image": "picture",
                "share": "sink-like visual tokens",
                "median_largest": "largest median cosine",
            },
            figures=self._figures(pages, median, middle, len(records)),
        )

    def _figures(
        self,
        pages: list[PicturePage],
        median: Float[np.ndarray, " layer"],
        middle: slice,
        n_prompts: int,
    ) -> list[Figure]:
        return [
            PictureMap(
                "map",
                "Cosine with the first token of the text",
                f"Largest where the blocks {middle.start} to {middle.stop - 1} begin.",
                tuple(pages),
                (Quantity("cosine", "Cosine", "cosine", threshold=self.aligned),),
                (CellClass("like BOS", "ring", f"cosine above {self.aligned:g}"),),
            ),
            Lines(
                "median",
                "Cosine with the first token of the text by layer",
                f"Median over visual tokens, mean over {counted(n_prompts, 'prompt')}.",
                (Series("median", np.arange(len(median)), median, emphasis=True),),
                "layer",
                "cosine",
            ),
        ]


def _rows(
    record: PromptRecord,
    cosine: Float[np.ndarray, "layer patch"],
    like: Bool[np.ndarray, " patch"],
    middle: slice,
) -> list[dict[str, Any]]:
    """The visual tokens that become like the first token of the text."""
    return [
        {
            "prompt": record.index,
            "image": cell.image,
            "row": cell.row,
            "col": cell.col,
            "position": cell.position,
            "cosine": float(cosine[middle, cell.place].max()),
            "layer": int(cosine[middle, cell.place].argmax()) + middle.start,
        }
        for cell in cells_of(record)
        if like[cell.place]
    ]


def _pages(
    record: PromptRecord, top: Float[np.ndarray, " patch"], like: Bool[np.ndarray, " patch"]
) -> list[PicturePage]:
    value, classes = np.full(len(record), np.nan), np.full(len(record), -1)
    value[visual_positions(record)] = top
    classes[visual_positions(record)] = np.where(like, 0, -1)
    of = f"{int(like.sum())} of {len(like)} visual tokens {verb(like.sum(), 'is', 'are')}"
    said = f"{of} like the first token of the text."
    return [page(record, i, [value], classes, sentence=said) for i in range(len(spans_of(record).pictures))]
