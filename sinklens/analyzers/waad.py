"""Windowed average attention distance: how far local heads look back, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from sinklens.core.errors import UsageError
from sinklens.core.figures import Lines, Series
from sinklens.core.papers import PREPLAN_AND_ANCHOR
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord, Trace

from .base import Analyzer, Finding, Status, registry
from .heads import average, number, usable

AS_IT_IS, WITHOUT_FIRST = 0, 1
MIN_TOKENS = 32
MOST_ROWS = 100


@registry.register("waad")
@dataclass(frozen=True)
class Waad(Analyzer):
    """Tokens at which local heads look back farther than usual: starts of phrases, by attention distance.

    How it is computed: heads are ordered by how far their queries look back on average; the 30 % that look back
    least, over all layers together, are the local heads. At each token WAAD is the distance to the attended key, cut
    at 10 tokens, in the mean attention of those heads. The same is given without the first token's column, rows
    renormalised. A peak is a token above its two neighbours and at or above the `quantile` of its prompt; a turn is a
    token among the `turns` share with the largest change to the next one. Every curve has peaks; found are those at
    least `margin` tokens above the median of their prompt.

    Compared with the paper: it reads the tokens of a model's response; here every token of a prompt is treated as
    response, so heads are ordered over all queries. 30 %, 10 tokens and the share of turns (40 %) are the paper's;
    the definition of a peak and `margin` are ours. The paper does not leave out the first token. The
    formulas are those of the text; no official code was read, so there is no other recipe.

    When not to trust it: a head that rests on the first token looks back far, so sinks decide which heads are local;
    the second variant shows their part in the value, but the heads are those of the first. The first ten tokens
    cannot look back ten tokens, so values rise at the start by construction.

    Args:
        quantile: Of a prompt's values, from which a local maximum is a peak.
        turns: Share of the tokens called turns.
        margin: Tokens above the prompt's median from which a peak stands out.
    """

    quantile: float = 0.8
    turns: float = 0.4
    margin: float = 2.0

    name = "waad"
    title = "How far local heads look back"
    place = 60
    default = False
    formula = (
        '<math display="block"><msub><mi>WAAD</mi><mi>t</mi></msub><mo>=</mo><munder><mo>∑</mo><mrow><mi>s</mi>'
        "<mo>≤</mo><mi>t</mi></mrow></munder><msubsup><mi>Ā</mi><mrow><mi>t</mi><mo>,</mo><mi>s</mi></mrow><mi>local</mi>"
        "</msubsup><mspace width='0.2em'/><mi>min</mi><mo>(</mo><mi>t</mi><mo>−</mo><mi>s</mi><mo>,</mo>"
        "<mn>10</mn><mo>)</mo></math>"
    )
    needs = frozenset({sig.LOCAL_DISTANCE, sig.VISIBLE_QUERIES})
    summarises = (
        "n_prompts", "n_tokens", "n_peaks", "n_far", "peaks_per_100_tokens", "mean", "mean_without_first",
    )  # fmt: skip
    reference = PREPLAN_AND_ANCHOR

    def __post_init__(self) -> None:
        for name in ("quantile", "turns"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"{name} of waad must lie between 0 and 1, got {getattr(self, name)}.")
        if self.margin <= 0:
            raise UsageError(f"margin of waad must be positive, got {self.margin}.")

    def analyze(self, trace: Trace) -> Finding:
        records, reason = usable(trace, self.needs, MIN_TOKENS, looks_back=True)
        if reason is not None:
            return self.not_applicable(reason)
        values = [record[sig.LOCAL_DISTANCE].astype(np.float64) for record in records]
        marks = [peaks(value[AS_IT_IS], self.quantile) for value in values]
        rows = [row for r, v, m in zip(records, values, marks, strict=True) for row in self._rows(r, v, m)]
        rows.sort(key=lambda row: (-row["waad"], row["prompt"], row["position"]))
        tokens = sum(len(record) for record in records)
        whole = np.concatenate(values, axis=1)
        n_far = sum(row["above_usual"] >= self.margin for row in rows)
        summary = {
            "n_prompts": len(records),
            "n_tokens": tokens,
            "n_peaks": len(rows),
            "n_far": n_far,
            "peaks_per_100_tokens": 100 * len(rows) / tokens,
            "mean": average(whole[AS_IT_IS]),
            "mean_without_first": average(whole[WITHOUT_FIRST]),
        }
        verdict = (
            f"Local heads look back {_words(summary['mean'])} tokens on average "
            f"({_words(summary['mean_without_first'])} without the first token); {self._standing_out(rows, n_far)}."
        )
        notes = ["All positions are treated as response."]
        if len(rows) > MOST_ROWS:
            notes.append(f"The {MOST_ROWS} highest of {len(rows)} peaks are listed.")
        return self.finding(
            Status.FOUND if n_far else Status.NOT_FOUND,
            verdict,
            rows=rows[:MOST_ROWS],
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=[_figure(records[0], values[0], marks[0])],
            notes=notes,
        )

    def _standing_out(self, rows: Sequence[dict[str, Any]], n_far: int) -> str:
        if n_far:
            tokens = "token" if n_far == 1 else "tokens"
            return f"at {n_far} {tokens} they look at least {self.margin:g} tokens farther than usual in the prompt"
        most = max((row["above_usual"] for row in rows), default=None)
        close = "" if most is None else f" (the farthest peak: {most:.2f} above)"
        return f"no token stands out by {self.margin:g} tokens above the median of its prompt{close}"

    def _rows(self, record: PromptRecord, value: np.ndarray, marks: np.ndarray) -> list[dict[str, Any]]:
        if not marks.any():
            return []
        change = np.abs(np.diff(value[AS_IT_IS], append=np.nan))
        turning = change >= np.nanquantile(change, 1 - self.turns)
        usual = float(np.nanmedian(value[AS_IT_IS]))
        return [
            {
                "prompt": record.index,
                "position": place,
                "token": record.pieces[place],
                "waad": float(value[AS_IT_IS, place]),
                "waad_without_first": number(value[WITHOUT_FIRST, place]),
                "above_usual": float(value[AS_IT_IS, place]) - usual,
                "change": number(change[place]),
                "turn": bool(turning[place]),
            }
            for place in np.flatnonzero(marks).tolist()
        ]


UNITS = {
    "waad": "tokens, at most 10",
    "waad_without_first": "tokens, without the first token's column",
    "above_usual": "tokens above the median of the prompt",
    "change": "tokens, difference to the next position",
    "turn": "whether that is among the largest changes of the prompt",
}
LABELS = {
    "waad": "distance",
    "waad_without_first": "distance without the first token",
    "above_usual": "above the usual",
    "n_far": "tokens that stand out",
    "margin": "tokens above the median from which a peak stands out",
    "change": "change to the next token",
    "mean": "mean distance",
    "mean_without_first": "mean distance without the first token",
    "quantile": "quantile that makes a peak",
    "turns": "share of tokens called turns",
}


def peaks(values: Float[np.ndarray, " pos"], quantile: float) -> Bool[np.ndarray, " pos"]:
    """Positions above both neighbours and at or above the quantile of what is known.

    Ends, plateaus and the neighbours of unknown values are no peaks.
    """
    found = np.zeros(len(values), dtype=bool)
    if len(values) < 3 or np.isnan(values).all():
        return found
    middle = values[1:-1]
    high = np.nanquantile(values, quantile)
    found[1:-1] = (middle > values[:-2]) & (middle > values[2:]) & (middle >= high)
    return found


def rhythm_lines(
    title: str,
    caption: str,
    record: PromptRecord,
    curves: Sequence[Series],
    marks: np.ndarray,
    order: np.ndarray,
) -> Lines:
    """Curves over the positions of one prompt, with its five highest peaks named."""
    places = np.flatnonzero(marks)
    shown = sorted(places[np.argsort(-order[places], kind="stable")][:5].tolist())
    unit = "tokens" if "back" in title else "share"
    named = tuple((float(place), repr(record.pieces[place])) for place in shown)
    return Lines("prompt", title, caption, tuple(curves), "position", unit, marks=named)


def _figure(record: PromptRecord, value: np.ndarray, marks: np.ndarray) -> Lines:
    x = np.arange(len(record))
    curves = (
        Series("as it is", x, value[AS_IT_IS], emphasis=True),
        Series("without the first token", x, value[WITHOUT_FIRST]),
    )
    caption = (
        f"Prompt {record.index}: distance to the attended key, cut at 10 tokens, in the mean attention of the local "
        "heads. Named: the five highest peaks."
    )
    return rhythm_lines("How far local heads look back", caption, record, curves, marks, value[AS_IT_IS])


def _words(value: float | None) -> str:
    return "an unknown number of" if value is None else f"{value:.2f}"
