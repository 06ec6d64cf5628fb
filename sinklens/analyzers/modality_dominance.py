"""Modality dominance: how much attention a token of text gets against one of a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sinklens.core.counts import counted
from sinklens.core.errors import UsageError
from sinklens.core.figures import Figure, Lines, Series
from sinklens.core.reference import Reference
from sinklens.inputs.spans import Kind
from sinklens.tracers import signals_pictures as pic
from sinklens.tracers.trace import PromptRecord, Trace

from .base import Analyzer, Finding, Status, registry
from .pictured import spans_of, visual_positions, why_none, with_pictures

SETS = {"text": 0, "last": 1, "generated": 2}


@registry.register("modality-dominance")
@dataclass(frozen=True)
class ModalityDominance(Analyzer):
    """How much more attention a token of text gets than a token of a picture (MDI), and each of its even share (AEI).

    How it is computed: attention of the queries, mean over heads and summed over them, on the tokens of the text and on
    visual tokens, of the input only. MDI is the attention per token of text over that per visual token; AEI is a
    modality's part of the attention over its part of the tokens, so that MDI is the ratio of the two AEI. Early, middle
    and late are the first, the middle and the last two layers, averaged. It is found if the late MDI exceeds
    `dominant` or falls below its inverse.

    Compared with the paper: the queries there are the generated tokens; `queries=generated` takes the answer in the
    prompt, and the default, the text after the picture, does without one. The paper leaves open whether BOS counts as
    text; it is a sink of the text, and MDI changes by large factors without it: both are given, with `bos` deciding the
    rows. `system` counts text before the picture. Delimiters count as neither. No code is published.

    When not to trust it: MDI depends on the number of visual tokens by construction; compare only like resolutions.
    Text after the picture attends to itself, and later text sees more of it than earlier text.

    Args:
        queries: `text`, `last` or `generated`.
        bos: Whether the first token of the text is part of it.
        system: Whether the text before the picture is part of it.
        dominant: MDI in late layers from which text (or picture) dominates.
    """

    queries: str = "text"
    bos: bool = True
    system: bool = True
    dominant: float = 2.0

    name = "modality-dominance"
    title = "Modality dominance"
    place = 75
    default = False
    of_pictures = True
    formula = (
        '<math display="block"><mi>MDI</mi><mo>=</mo><mfrac><mrow><msub><mi>A</mi><mi>T</mi></msub><mo>/</mo>'
        "<mo>|</mo><mi>T</mi><mo>|</mo></mrow><mrow><msub><mi>A</mi><mi>O</mi></msub><mo>/</mo><mo>|</mo><mi>O</mi>"
        "<mo>|</mo></mrow></mfrac></math>"
    )
    needs = frozenset({pic.QUERIES_RECEIVED, pic.QUERIES_VISIBLE})
    summarises = (
        "n_prompts", "mdi_early", "aei_text_early", "mdi_other_early", "mdi_middle", "aei_text_middle",
        "mdi_other_middle", "mdi_late", "aei_text_late", "mdi_other_late",
    )  # fmt: skip
    reference = Reference(
        key="wu2025when",
        title="When Language Overrules: Revealing Text Dominance in Multimodal Large Language Models",
        authors="Huyu Wu and Meng Tang and Xinhan Zheng and Haiyun Jiang",
        year=2025,
        arxiv="2508.10552",
        section="MDI and AEI",
    )

    def __post_init__(self) -> None:
        if self.queries not in SETS:
            raise UsageError(
                f"modality-dominance: queries must be text, last or generated, got {self.queries!r}."
            )

    def analyze(self, trace: Trace) -> Finding:
        reason = why_none(trace, *self.needs)
        if reason:
            return self.not_applicable(reason)
        index = SETS[self.queries]
        records = [r for r in with_pictures(trace, *self.needs) if r[pic.QUERIES_VISIBLE][:, index].any()]
        if not records:
            return self.not_applicable(
                f"no prompt has queries of the kind {self.queries!r} after its picture."
            )
        kept = np.array([self._indices(record, self.bos) for record in records])
        other = np.array([self._indices(record, not self.bos) for record in records])
        if np.isnan(kept).all():
            return self.not_applicable("no prompt has both text and visual tokens that the queries see.")
        mean = np.nanmean(kept, axis=0)
        rows = [
            {"layer": layer, "mdi": float(m), "aei_text": float(t), "aei_visual": float(v)}
            for layer, (m, t, v) in enumerate(mean)
            if not np.isnan(m)
        ]
        thirds = _thirds(len(mean))
        summary: dict[str, Any] = {"n_prompts": len(records)}
        for name, layers in thirds.items():
            summary[f"mdi_{name}"] = float(np.nanmean(kept[:, layers, 0]))
            summary[f"aei_text_{name}"] = float(np.nanmean(kept[:, layers, 1]))
            summary[f"mdi_other_{name}"] = _mean_or_none(other[:, layers, 0])
        late = summary["mdi_late"]
        found = late > self.dominant or late < 1 / self.dominant
        return self.finding(
            Status.FOUND if found else Status.NOT_FOUND,
            self._verdict(summary, late),
            rows=rows,
            summary=summary,
            units=UNITS,
            labels={
                **LABELS,
                **{f"mdi_other_{n}": f"{n} MDI {'without' if self.bos else 'with'} BOS" for n in thirds},
            },
            figures=_figures(mean, len(records)),
        )

    def _indices(self, record: PromptRecord, bos: bool) -> Float[np.ndarray, "layer 3"]:
        """MDI, AEI of text, AEI of pictures by layer."""
        spans = spans_of(record)
        text = spans.is_(Kind.SYSTEM, Kind.QUESTION) if self.system else spans.is_(Kind.QUESTION)
        first = spans.is_(Kind.SYSTEM, Kind.QUESTION).nonzero()[0]
        if not bos and len(first):
            text[first[0]] = False
        received = record[pic.QUERIES_RECEIVED][:, SETS[self.queries]].astype(np.float64)
        visual = visual_positions(record)
        by_text, by_picture = received[:, text].sum(1), received[:, visual].sum(1)
        pairs = zip(by_text, by_picture, strict=True)
        return np.array([dominance(t, o, int(text.sum()), len(visual)) for t, o in pairs])

    def _verdict(self, summary: dict[str, Any], late: float) -> str:
        level = f"MDI {summary['mdi_early']:.2f} early, {summary['mdi_middle']:.2f} in the middle, {late:.2f} late"
        if late > self.dominant:
            return f"A token of text gets {late:.1f} times the attention of a visual token in late layers ({level})."
        if late < 1 / self.dominant:
            return (
                f"A visual token gets {1 / late:.1f} times the attention of a token of text in late layers "
                f"({level})."
            )
        return f"Neither text nor pictures dominate in late layers ({level})."


def dominance(text: float, visual: float, n_text: int, n_visual: int) -> tuple[float, float, float]:
    """MDI, AEI of the text and AEI of the pictures; NaN without tokens of both and attention on pictures."""
    total, tokens = text + visual, n_text + n_visual
    if n_text == 0 or n_visual == 0 or visual <= 0 or total <= 0:
        return float("nan"), float("nan"), float("nan")
    aei_text, aei_visual = (text / total) / (n_text / tokens), (visual / total) / (n_visual / tokens)
    return (text / n_text) / (visual / n_visual), aei_text, aei_visual


def _thirds(layers: int) -> dict[str, slice]:
    middle = max(0, layers // 2 - 1)
    return {
        "early": slice(0, 2),
        "middle": slice(middle, middle + 2),
        "late": slice(max(0, layers - 2), layers),
    }


def _mean_or_none(values: np.ndarray) -> float | None:
    return None if np.isnan(values).all() else float(np.nanmean(values))


UNITS = {
    "mdi": "attention per token of text over attention per visual token",
    "aei_text": "part of the attention over part of the tokens",
    "aei_visual": "part of the attention over part of the tokens",
}
LABELS = {
    "mdi": "MDI",
    "aei_text": "AEI of text",
    "aei_visual": "AEI of pictures",
    **{f"mdi_{name}": f"{name} MDI" for name in ("early", "middle", "late")},
    **{f"aei_text_{name}": f"{name} AEI of text" for name in ("early", "middle", "late")},
}


def _figures(mean: np.ndarray, prompts: int) -> list[Figure]:
    x = np.arange(len(mean))
    return [
        Lines(
            "dominance",
            "Text against pictures by layer",
            f"MDI and AEI, mean over {counted(prompts, 'prompt')}; 1 is no preference.",
            (
                Series("MDI", x, mean[:, 0], emphasis=True),
                Series("AEI of text", x, mean[:, 1]),
                Series("AEI of pictures", x, mean[:, 2]),
            ),
            "layer",
            "ratio",
            log_y=True,
        )
    ]
