"""Five classes of heads by where the last queries of a prompt look."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from sinklens.core.counts import counted
from sinklens.core.errors import UsageError
from sinklens.core.figures import Figure, Heatmap, Lines, Series
from sinklens.core.papers import SINK_PROFILER
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord, Trace

from .base import Analyzer, Finding, Status, registry
from .heads import PerHead, mean, usable
from .window_shares import TAIL, first_share

CLASSES = ("strong sink", "moderate sink", "distributed", "recency", "mixed")
NONE = -1


@registry.register("head-classes")
@dataclass(frozen=True)
class HeadClasses(Analyzer):
    """Heads by where the last 64 queries look: first tokens, everywhere, recent tokens, or none of these.

    How it is computed: per prompt, layer and head, the weights of the last 64 queries are averaged per key. The head
    gets the first class that fits: strong sink (the first `first` tokens have more than `strong` of it), moderate
    sink (more than `moderate`), distributed (its entropy exceeds `distributed` of the logarithm of the length),
    recency (its largest entry lies beyond `recency` of the length), else mixed. A head's class is the one it has in
    most prompts (the earlier in that order, if two are even), with the share of prompts that agree.

    Compared with the paper: there is no paper, rules and cuts are those of a published program. It classifies on one
    text; with one prompt the result is the same. As there, keys that a query cannot see count as weight 0, without a
    correction for visibility, and the entropy is that of the mean distribution, not the mean entropy. Mass on a
    learned sink logit is not put back (the program was made for models without).

    When not to trust it: a sink elsewhere than on the first tokens makes a head mixed or recency. Under a sliding
    window the first tokens are out of sight, so no head of such a layer can be a sink class. At 64 tokens the last
    queries are all queries, and the early ones see little else than the first tokens.

    Args:
        first: How many first tokens count as the sink.
    """

    first: int = 4
    strong: float = 0.5
    moderate: float = 0.2
    distributed: float = 0.8
    recency: float = 0.8
    min_tokens: int = 64

    name = "head-classes"
    title = "Head classes"
    place = 50
    formula = (
        '<math display="block"><munder><mo>∑</mo><mrow><mi>k</mi><mo>&lt;</mo><mn>4</mn></mrow></munder><msub>'
        "<mi>m</mi><mi>k</mi></msub><mo>&gt;</mo><mn>0.5</mn><mtext> or </mtext><mn>0.2</mn><mo>,</mo>"
        "<mspace width='1em'/><mfrac>"
        "<mrow><mi>H</mi><mo>(</mo><mi>m</mi><mo>)</mo></mrow><mrow><mi>ln</mi><mi>T</mi></mrow></mfrac>"
        "<mo>&gt;</mo><mn>0.8</mn><mo>,</mo><mspace width='1em'/><mi>arg max</mi><mspace width='0.2em'/><mi>m</mi>"
        "<mo>&gt;</mo><mn>0.8</mn><mi>T</mi><mo>,</mo><mspace width='2em'/><msub><mi>m</mi><mi>k</mi></msub>"
        "<mo>=</mo><munder><mi>mean</mi><mrow><mi>q</mi><mo>≥</mo><mi>T</mi><mo>−</mo><mn>64</mn></mrow></munder>"
        "<mspace width='0.2em'/><msub><mi>A</mi><mrow><mi>q</mi><mo>,</mo><mi>k</mi></mrow></msub></math>"
    )
    needs = frozenset(
        {sig.ATTENTION_TAIL, sig.TAIL_ENTROPY, sig.TAIL_PEAK, sig.KEPT_POSITIONS, sig.VISIBLE_QUERIES}
    )
    summarises = (
        "n_heads", "n_prompts", "first", "n_strong_sink", "n_moderate_sink", "n_distributed", "n_recency",
        "n_mixed",
    )  # fmt: skip
    reference = SINK_PROFILER

    def __post_init__(self) -> None:
        if not 1 <= self.first <= 16:
            raise UsageError(f"first of head-classes must lie between 1 and 16, got {self.first}.")
        if not self.moderate <= self.strong:
            raise UsageError("head-classes needs moderate <= strong.")

    def analyze(self, trace: Trace) -> Finding:
        records, reason = usable(trace, self.needs, self.min_tokens, looks_back=True)
        if reason is not None:
            return self.not_applicable(reason)
        votes = np.stack([self.classify(record) for record in records])
        winner, agreement = majority(votes)
        share = mean([first_share(record, self.first) for record in records])
        relative = mean([relative_entropy(record) for record in records])
        peak = mean([record[f"{sig.TAIL_PEAK.name}_pos"] / len(record) for record in records])
        rows = [
            {
                "layer": layer,
                "head": head,
                "class": CLASSES[winner[layer, head]],
                "agreement": float(agreement[layer, head]),
                "share_first": float(share[layer, head]),
                "entropy_ratio": float(relative[layer, head]),
                "peak_at": float(peak[layer, head]),
            }
            for layer, head in np.argwhere(winner != NONE).tolist()
        ]
        rows.sort(key=lambda r: (CLASSES.index(r["class"]), -r["share_first"], r["layer"], r["head"]))
        summary = self._summary(records, winner)
        sinks = summary["n_strong_sink"] + summary["n_moderate_sink"]
        return self.finding(
            Status.FOUND if sinks else Status.NOT_FOUND,
            self._verdict(summary),
            rows=rows,
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=self._figures(winner, share, len(records)),
            notes=_notes(records, agreement),
        )

    def classify(self, record: PromptRecord) -> np.ndarray:
        """Class number of each head on one prompt, -1 in layers without attention."""
        share = first_share(record, self.first)
        peak = record[f"{sig.TAIL_PEAK.name}_pos"]
        tests = [
            np.isnan(share),
            share > self.strong,
            share > self.moderate,
            relative_entropy(record) > self.distributed,
            peak > self.recency * len(record),
        ]
        return np.select(tests, [NONE, 0, 1, 2, 3], default=4)

    def _summary(self, records: list[PromptRecord], winner: np.ndarray) -> dict[str, Any]:
        counts = Counter(winner[winner != NONE].tolist())
        return {
            "n_heads": int((winner != NONE).sum()),
            "n_prompts": len(records),
            "first": self.first,
            **{f"n_{word.replace(' ', '_')}": counts.get(i, 0) for i, word in enumerate(CLASSES)},
        }

    def _verdict(self, s: dict[str, Any]) -> str:
        rest = [
            f"{s[key]} {one if s[key] == 1 else several}"
            for key, one, several in (
                ("n_distributed", "spreads it", "spread it"),
                ("n_recency", "looks at recent tokens", "look at recent tokens"),
                ("n_mixed", "does something else", "do something else"),
            )
            if s[key]
        ]
        text = (
            f"The last queries spend more than {self.strong:g} of their attention on the first {self.first} tokens "
            f"in {s['n_strong_sink']} of {s['n_heads']} heads, more than {self.moderate:g} in "
            f"{s['n_moderate_sink']} {'other' if s['n_moderate_sink'] == 1 else 'others'}"
        )
        return f"{text}; {', '.join(rest)}." if rest else f"{text}."

    def _figures(self, winner: np.ndarray, share: PerHead, n: int) -> list[Figure]:
        layers = np.arange(len(winner))
        has = (winner != NONE).any(1)
        return [
            Heatmap(
                "share",
                f"Attention of the last queries to the first {self.first} tokens",
                f"Sum over the first {self.first} tokens of the mean weight over the last {TAIL} queries; mean over "
                f"{counted(n, 'prompt')}. Rings: strong sink heads.",
                share,
                "share",
                marks=tuple((int(a), int(b)) for a, b in np.argwhere(winner == 0)),
                limits=(0.0, 1.0),
            ),
            Lines(
                "classes",
                "Head classes by layer",
                f"Number of heads of each class; the class in most of {counted(n, 'prompt')}.",
                tuple(
                    Series(word, layers, np.where(has, (winner == i).sum(1), np.nan), emphasis=i == 0)
                    for i, word in enumerate(CLASSES)
                ),
                "layer",
                "heads",
            ),
        ]


UNITS = {
    "agreement": "share of prompts in which the head has this class",
    "share_first": "share of the last queries' attention on the first tokens, mean over prompts",
    "entropy_ratio": "entropy of the mean distribution over the logarithm of the length",
    "peak_at": "most attended position over the length, mean over prompts",
}
LABELS = {
    "agreement": "prompts that agree",
    "share_first": "attention to the first tokens",
    "entropy_ratio": "entropy against uniform",
    "peak_at": "most attended place",
    "first": "first tokens counted",
    "n_strong_sink": "strong sink heads",
    "n_moderate_sink": "moderate sink heads",
    "n_distributed": "distributed heads",
    "n_recency": "recency heads",
    "n_mixed": "mixed heads",
}


def relative_entropy(record: PromptRecord) -> PerHead:
    """Entropy of the mean distribution of the last queries over the logarithm of the prompt's length."""
    return record[sig.TAIL_ENTROPY].astype(np.float64) / np.log(len(record))


def majority(votes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Most frequent class per head (the first on ties), and the share of prompts with it; -1 and 0 if unknown."""
    counts = np.stack([(votes == i).sum(0) for i in range(len(CLASSES))])
    unknown = counts.sum(0) == 0
    return np.where(unknown, NONE, counts.argmax(0)), counts.max(0) / np.maximum(counts.sum(0), 1)


def _notes(records: list[PromptRecord], agreement: np.ndarray) -> list[str]:
    notes = []
    if min(len(record) for record in records) < 2 * TAIL:
        notes.append(
            f"Some prompts have fewer than {2 * TAIL} tokens: the last {TAIL} queries are most of them, and see few "
            "other keys than the first."
        )
    unsure = int(((agreement > 0) & (agreement < 0.75)).sum())
    if unsure:
        heads = "1 head has its" if unsure == 1 else f"{unsure} heads have their"
        notes.append(f"{heads} class in fewer than three quarters of the prompts.")
    return notes
