"""Embedding lens: which tokens of the vocabulary visual tokens point to."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from sinklens.core.counts import counted
from sinklens.core.figures import Figure, Lines, Series
from sinklens.core.papers import EMBED_LENS
from sinklens.tracers import signals_pictures as pic
from sinklens.tracers.trace import PromptRecord, Trace

from .base import Analyzer, Finding, Status, registry
from .pictured import cells_of, spans_of, why_none, with_pictures, word


@registry.register("embed-lens")
@dataclass(frozen=True)
class EmbedLens(Analyzer):
    """Which tokens of the vocabulary the visual tokens are nearest to, by the input embedding.

    How it is computed: where a block begins (the first one; with `every`, each so many blocks), the cosine of each
    visual token's state with every row of the input embedding, no norm applied; the ten nearest rows are kept. Left
    out are rows that pad or stand for a picture, rows beyond the tokenizer, and rows that are zero or equal to another
    row to the last bit, which were never trained; how many there were is in the summary. A row of the table is a
    vocabulary token that is the nearest of visual tokens, with their number, their mean cosine and the number of
    pictures. Tokens that are nearest in most pictures say nothing of a picture: those of sinks and dead tokens.

    Compared with the paper: EmbedLens uses the input embedding and not the unembedding, which would be the logit lens.
    The published code looks at layer 0 with k = 10 and excludes nothing, where a vocabulary has no untrained rows.
    The list of excluded rows is ours. The share of pictures that makes it found is ours too.

    When not to trust it: another paper (LatentLens, arXiv 2602.00462) reports that input embeddings read about 30 % of
    the visual tokens. Rows that were hardly trained, but differ, stay in and can be the nearest of many tokens. A small
    cosine is a nearest row all the same: read it beside the cosine of the second nearest.

    Args:
        every: Also look where every so many blocks begin; 0 looks at the first only.
        common: Share of the pictures in which a vocabulary token must be the nearest of some visual token to count as
            one that says nothing of a picture.
        most_rows: Vocabulary tokens per layer in the table.
    """

    every: int = 0
    common: float = 0.8
    most_rows: int = 32

    name = "embed-lens"
    title = "Embedding lens"
    place = 71
    default = False
    of_pictures = True
    formula = (
        '<math display="block"><msub><mi>E</mi><mi>k</mi></msub><mo>(</mo><mi>h</mi><mo>)</mo><mo>=</mo><msub>'
        "<mi>top</mi><mi>k</mi></msub><munder><mi>cos</mi><mrow><mi>i</mi><mo>∈</mo><mi>V</mi></mrow></munder><mo>(</mo><mi>h</mi><mo>,</mo>"
        "<msub><mi>e</mi><mi>i</mi></msub><mo>)</mo></math>"
    )
    needs = frozenset({pic.LENS_ID, pic.LENS_COSINE, pic.LENS_EXCLUDED})
    summarises = (
        "n_visual", "n_prompts", "layers", "cosine", "cosine_second", "common_tokens", "common_share",
        "excluded_pad", "excluded_placeholder", "excluded_beyond_the_tokenizer", "excluded_untrained",
    )  # fmt: skip
    reference = EMBED_LENS.at("the probe: cosine with the input embedding; semantic_identification.ipynb")

    @property
    def lens_every(self) -> int:
        """How often the tracer looks."""
        return self.every

    def analyze(self, trace: Trace) -> Finding:
        reason = why_none(trace, *self.needs)
        if reason:
            return self.not_applicable(reason)
        records = with_pictures(trace, *self.needs)
        layers = np.flatnonzero((records[0][pic.LENS_ID] >= 0).any((1, 2))).tolist()
        if not layers:
            return self.not_applicable("the vocabulary has no row that counts as a neighbour.")
        rows = [row for layer in layers for row in self._rows(trace, records, layer)]
        first = [row for row in rows if row["layer"] == layers[0]]
        n_pictures = sum(len(spans_of(record).pictures) for record in records)
        common = [row for row in first if row["picture_share"] >= self.common] if n_pictures > 1 else []
        summary = self._summary(records, layers, rows, common)
        return self.finding(
            Status.FOUND if common else Status.NOT_FOUND,
            _verdict(summary, common, first),
            rows=rows,
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=_figures(records, layers) if len(layers) > 1 else [],
            notes=["One picture alone cannot tell what is common to pictures."] if n_pictures == 1 else [],
        )

    def _rows(self, trace: Trace, records: list[PromptRecord], layer: int) -> list[dict[str, Any]]:
        """Vocabulary tokens by the visual tokens whose nearest they are."""
        cosines: dict[int, list[float]] = defaultdict(list)
        pictures: dict[int, set[tuple[int, int]]] = defaultdict(set)
        total = 0
        for record in records:
            ids, values = record[pic.LENS_ID][layer, :, 0], record[pic.LENS_COSINE][layer, :, 0]
            total += len(ids)
            for cell in cells_of(record):
                token = int(ids[cell.place])
                cosines[token].append(float(values[cell.place]))
                pictures[token].add((record.index, cell.image))
        n_pictures = sum(len(spans_of(record).pictures) for record in records)
        order = sorted(cosines, key=lambda token: (-len(cosines[token]), token))[: self.most_rows]
        return [
            {
                "layer": layer,
                "token": word(trace, token),
                "token_id": token,
                "n_visual": len(cosines[token]),
                "share": len(cosines[token]) / total,
                "cosine": float(np.mean(cosines[token])),
                "n_pictures": len(pictures[token]),
                "picture_share": len(pictures[token]) / n_pictures,
            }
            for token in order
        ]

    def _summary(
        self,
        records: list[PromptRecord],
        layers: list[int],
        rows: list[dict[str, Any]],
        common: list[dict[str, Any]],
    ) -> dict[str, Any]:
        values = np.concatenate([record[pic.LENS_COSINE][layers[0]] for record in records])
        counts = records[0][pic.LENS_EXCLUDED].tolist()
        return {
            "n_visual": len(values),
            "n_prompts": len(records),
            "layers": layers,
            "cosine": float(np.nanmean(values[:, 0])),
            "cosine_second": float(np.nanmean(values[:, 1])) if values.shape[1] > 1 else None,
            "common_tokens": len(common),
            "common_share": float(sum(row["share"] for row in common)),
            **{
                f"excluded_{reason.replace(' ', '_')}": int(n)
                for reason, n in zip(pic.REASONS, counts, strict=True)
            },
        }


UNITS = {
    "n_visual": "visual tokens whose nearest vocabulary token it is",
    "share": "share of all visual tokens",
    "cosine": "cosine with its input embedding, mean over them",
    "n_pictures": "pictures in which it is the nearest of some visual token",
    "picture_share": "share of all pictures",
    "layer": "the block that begins",
}
LABELS = {
    "n_visual": "visual tokens",
    "n_pictures": "pictures",
    "picture_share": "share of pictures",
    "cosine": "mean cosine of the nearest",
    "cosine_second": "mean cosine of the second nearest",
    "common_tokens": "vocabulary tokens near some visual token of most pictures",
    "common_share": "visual tokens nearest to those",
    "excluded_pad": "rows left out: padding",
    "excluded_placeholder": "rows left out: stand for pictures",
    "excluded_beyond_the_tokenizer": "rows left out: beyond the tokenizer",
    "excluded_untrained": "rows left out: equal to others",
}


def _verdict(summary: dict[str, Any], common: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    level = f"mean cosine of the nearest {summary['cosine']:.2f}"
    if not common:
        top = rows[0]
        return (
            f"No vocabulary token is the nearest of visual tokens in most pictures; the most frequent is "
            f"{top['token']!r} for {100 * top['share']:.1f} % of them ({level})."
        )
    names = ", ".join(repr(row["token"]) for row in common[:3])
    verb = "is the nearest" if len(common) == 1 else "are the nearest"
    return (
        f"{names}{' and others' if len(common) > 3 else ''} {verb} of visual tokens in most pictures, "
        f"{100 * summary['common_share']:.1f} % of all visual tokens ({level})."
    )


def _figures(records: list[PromptRecord], layers: list[int]) -> list[Figure]:
    means = [
        np.array(
            [
                float(np.nanmean(np.concatenate([r[pic.LENS_COSINE][at][:, rank] for r in records])))
                for at in layers
            ]
        )
        for rank in (0, pic.LENS_RANKS - 1)
    ]
    x = np.array(layers)
    return [
        Lines(
            "cosine",
            "Cosine with the nearest vocabulary tokens",
            f"Mean over the visual tokens of {counted(len(records), 'prompt')}, where each block begins.",
            (Series("nearest", x, means[0], emphasis=True), Series(f"{pic.LENS_RANKS}th", x, means[1])),
            "layer",
            "cosine",
        )
    ]
