"""Future attention influence: how much later tokens look at a token, and whether such tokens follow a look back."""

from __future__ import annotations

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
from .heads import number, usable
from .waad import AS_IT_IS, MIN_TOKENS, MOST_ROWS, WITHOUT_FIRST, peaks, rhythm_lines


@dataclass(frozen=True)
class Coupling:
    """How often a FAI peak follows a WAAD peak, and how often it follows any token.

    Attributes:
        p: Share of circular shifts of the WAAD peaks that are followed at least as often.
    """

    n_peaks: int
    after_peak: float
    base: float
    p: float


@registry.register("fai")
@dataclass(frozen=True)
class Fai(Analyzer):
    """Tokens that many later tokens look at: anchors, by the attention of distant queries.

    How it is computed: the 30 % of all heads that look back farthest, over all layers together, are the global
    heads. FAI of a token is its mean attention, in those heads, from the queries 10 to 100 tokens later; it is
    unknown for the last 10 tokens. The same is given without the first token's column, rows renormalised. A peak is
    a token above its two neighbours and at or above the `quantile` of its prompt. Every curve has peaks, and uniform
    attention gives early tokens more; so FAI is set against that of uniform causal attention at the same place, and
    found are the peaks whose ratio is at least `anchor` times the median of their prompt. Without the first token, a
    query that leaves less than 0.0001 beside it is left out, of sum and divisor. Coupling is the share of the WAAD
    peaks with a FAI peak at the same token or one of the next `window`, beside the same share over all tokens, and
    the share of `shuffles` circular shifts of the WAAD peaks that do at least as well.

    Compared with the paper: it reads the tokens of a model's response; here every token of a prompt is treated as
    response. 30 % and 10 to 100 are the paper's; a version in circulation ends at 50. The definition of a peak,
    `anchor`, the window of the coupling and its test are ours. Unknown values are left out and not set to 0.
    The formulas are those of the text; no official code was read, so there is no other recipe.

    When not to trust it: heads that rest on a sink look back far, so global heads are often sink heads, and the first
    token tops the list: the second variant, which `exclude_first` makes the one that is ranked, leaves only its
    column out, not other sinks. Tokens near the end are judged by few queries.

    Args:
        exclude_first: Rank by the variant without the first token.
        quantile: Of a prompt's values, from which a local maximum is a peak.
        window: Tokens after a WAAD peak in which a FAI peak counts as following.
        anchor: Multiple of the usual ratio to uniform attention from which a peak stands out.
    """

    exclude_first: bool = False
    quantile: float = 0.8
    window: int = 3
    anchor: float = 3.0
    shuffles: int = 499
    seed: int = 0

    name = "fai"
    title = "Tokens that later tokens look at"
    place = 61
    default = False
    formula = (
        '<math display="block"><msub><mi>FAI</mi><mi>s</mi></msub><mo>=</mo><munder><mi>mean</mi><mrow><mi>s</mi>'
        "<mo>+</mo><mn>10</mn><mo>≤</mo><mi>t</mi><mo>≤</mo><mi>min</mi><mo>(</mo><mi>N</mi><mo>,</mo><mi>s</mi><mo>+</mo>"
        "<mn>100</mn><mo>)</mo></mrow></munder><mspace width='0.2em'/><msubsup><mi>Ā</mi><mrow><mi>t</mi><mo>,</mo>"
        "<mi>s</mi></mrow><mi>global</mi></msubsup></math>"
    )
    needs = frozenset({sig.FUTURE_INFLUENCE, sig.LOCAL_DISTANCE, sig.VISIBLE_QUERIES})
    summarises = (
        "n_prompts", "n_peaks", "n_anchors", "first_token", "n_waad_peaks", "follows_waad_peak",
        "follows_any_token", "coupling_p",
    )  # fmt: skip
    reference = PREPLAN_AND_ANCHOR

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise UsageError(f"quantile of fai must lie between 0 and 1, got {self.quantile}.")
        if self.window < 0:
            raise UsageError(f"window of fai must not be negative, got {self.window}.")
        if self.anchor <= 1:
            raise UsageError(f"anchor of fai must be larger than 1, got {self.anchor}.")

    def analyze(self, trace: Trace) -> Finding:
        records, reason = usable(trace, self.needs, MIN_TOKENS, looks_back=True)
        if reason is not None:
            return self.not_applicable(reason)
        variant = WITHOUT_FIRST if self.exclude_first else AS_IT_IS
        values = [record[sig.FUTURE_INFLUENCE].astype(np.float64) for record in records]
        marks = [peaks(value[variant], self.quantile) for value in values]
        rows = [
            row for r, v, m in zip(records, values, marks, strict=True) for row in _rows(r, v, m, variant)
        ]
        rows.sort(
            key=lambda row: (-row["fai_without_first" if variant else "fai"], row["prompt"], row["position"])
        )
        coupling = self._coupling(records, values, marks, variant)
        n_peaks = sum(int(mark.sum()) for mark in marks)
        standing_out = [row for row in rows if row["peak"] and (row["times_usual"] or 0.0) >= self.anchor]
        summary: dict[str, Any] = {
            "n_prompts": len(records),
            "n_peaks": n_peaks,
            "n_anchors": len(standing_out),
            "first_token": _first(values),
            "n_waad_peaks": coupling.n_peaks if coupling else 0,
            "follows_waad_peak": coupling.after_peak if coupling else None,
            "follows_any_token": coupling.base if coupling else None,
            "coupling_p": coupling.p if coupling else None,
        }
        notes = ["All positions are treated as response."]
        if len(rows) > MOST_ROWS:
            notes.append(f"The {MOST_ROWS} highest of {len(rows)} tokens are listed.")
        return self.finding(
            Status.FOUND if standing_out else Status.NOT_FOUND,
            self._verdict(rows, standing_out, coupling),
            rows=rows[:MOST_ROWS],
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=[_figure(records[0], values[0], marks[0], variant)],
            notes=notes,
        )

    def _coupling(
        self, records: list[PromptRecord], values: list[np.ndarray], marks: list[np.ndarray], variant: int
    ) -> Coupling | None:
        """Over the tokens whose whole window has a known FAI; None without any, or without a WAAD peak."""
        followed, starts = [], []
        for record, value, mark in zip(records, values, marks, strict=True):
            known = np.flatnonzero(~np.isnan(value[variant]))
            last = int(known[-1]) - self.window if len(known) else 0
            looks = peaks(record[sig.LOCAL_DISTANCE][variant].astype(np.float64), self.quantile)
            if last > 1:
                followed.append(follows(mark, self.window)[1:last])
                starts.append(looks[1:last])
        n = sum(int(s.sum()) for s in starts)
        if not n:
            return None
        rng = np.random.default_rng(self.seed)
        hits = sum(int((f & s).sum()) for f, s in zip(followed, starts, strict=True))
        as_good = 1
        for _ in range(self.shuffles):
            moved = (np.roll(s, int(rng.integers(len(s)))) for s in starts)
            as_good += sum(int((f & s).sum()) for f, s in zip(followed, moved, strict=True)) >= hits
        base = float(np.concatenate(followed).mean())
        return Coupling(n, hits / n, base, as_good / (self.shuffles + 1))

    def _verdict(
        self, rows: list[dict[str, Any]], standing_out: list[dict[str, Any]], coupling: Coupling | None
    ) -> str:
        text = self._anchors(rows, standing_out)
        if coupling is None:
            return f"{text}; the prompts are too short to say whether peaks follow a look back."
        return (
            f"{text}; a peak follows within {self.window} tokens after {100 * coupling.after_peak:.0f} % of the peaks "
            f"of looking back, against {100 * coupling.base:.0f} % after any token (p = {coupling.p:.3f})."
        )

    def _anchors(self, rows: list[dict[str, Any]], standing_out: list[dict[str, Any]]) -> str:
        peaks_known = [row for row in rows if row["peak"] and row["times_usual"] is not None]
        top = max(standing_out or peaks_known, key=lambda row: row["times_usual"], default=None)
        if top is None:
            return "No token has a peak of attention from later tokens"
        place = f"{top['token']!r} on position {top['position']} of prompt {top['prompt']}"
        where = f"{top['times_usual']:.1f} times, {place}"
        if not standing_out:
            return (
                f"No token draws {self.anchor:g} times the usual attention of later tokens (at most {where})"
            )
        n = len(standing_out)
        draw = "token draws" if n == 1 else "tokens draw"
        return (
            f"{n} {draw} at least {self.anchor:g} times the usual attention of later tokens (at most {where})"
        )


UNITS = {
    "fai": "share of attention of the queries 10 to 100 tokens later",
    "fai_without_first": "the same without the first token's column",
    "times_usual": "ratio to uniform attention at its place, over the prompt's median of that ratio",
    "peak": "whether it is a local maximum",
}
LABELS = {
    "fai": "attention from later tokens",
    "fai_without_first": "the same without the first token",
    "times_usual": "times the usual",
    "n_anchors": "tokens that stand out",
    "anchor": "times the usual from which a peak stands out",
    "first_token": "attention to the first token from later tokens",
    "n_waad_peaks": "peaks of looking back",
    "follows_waad_peak": "share of them that a peak here follows",
    "follows_any_token": "share of all tokens that a peak here follows",
    "coupling_p": "p of that difference",
    "quantile": "quantile that makes a peak",
    "window": "tokens in which a peak follows",
}


def follows(marks: Bool[np.ndarray, " pos"], window: int) -> Bool[np.ndarray, " pos"]:
    """Whether a mark lies at the position or one of the next `window`."""
    found = marks.copy()
    for gap in range(1, window + 1):
        found[:-gap] |= marks[gap:]
    return found


def times_usual(value: Float[np.ndarray, " pos"]) -> Float[np.ndarray, " pos"]:
    """FAI over that of uniform causal attention at each place, over the median of that; NaN where not known.

    Where the median is 0 only tokens that draw anything stand out, without bound.
    """
    length = len(value)
    share = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, length + 1))])
    place = np.arange(length)
    start, stop = np.minimum(place + 10, length), np.minimum(place + 101, length)
    uniform = (share[stop] - share[start]) / np.where(stop > start, stop - start, np.nan)
    ratio = value / uniform
    if np.isnan(ratio).all():
        return ratio
    usual = max(float(np.nanmedian(ratio)), 1e-9)
    return ratio / usual


def _rows(
    record: PromptRecord, value: Float[np.ndarray, "variant pos"], marks: np.ndarray, variant: int
) -> list[dict[str, Any]]:
    """Peaks, and the position with the largest value even if it is at the edge (the first token mostly is)."""
    if np.isnan(value[variant]).all():
        return []
    usual = times_usual(value[variant])
    shown = {*np.flatnonzero(marks).tolist(), int(np.nanargmax(value[variant]))}
    return [
        {
            "prompt": record.index,
            "position": place,
            "token": record.pieces[place],
            "fai": number(value[AS_IT_IS, place]),
            "fai_without_first": number(value[WITHOUT_FIRST, place]),
            "times_usual": number(usual[place]),
            "peak": bool(marks[place]),
        }
        for place in sorted(shown)
    ]


def _first(values: list[np.ndarray]) -> float | None:
    known = [value[AS_IT_IS, 0] for value in values if not np.isnan(value[AS_IT_IS, 0])]
    return float(np.mean(known)) if known else None


def _figure(record: PromptRecord, value: np.ndarray, marks: np.ndarray, variant: int) -> Lines:
    x = np.arange(len(record))
    curves = (
        Series("as it is", x, value[AS_IT_IS], emphasis=variant == AS_IT_IS),
        Series("without the first token", x, value[WITHOUT_FIRST], emphasis=variant == WITHOUT_FIRST),
    )
    caption = (
        f"Prompt {record.index}: mean attention from the queries 10 to 100 tokens later, in the heads that look back "
        "farthest. The last 10 tokens have no such query. Named: the five highest peaks."
    )
    return rhythm_lines("Attention from later tokens", caption, record, curves, marks, value[variant])
