"""Background share: do visual sinks stand on the background more often than visual tokens do anyway?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from sinklens.core.counts import counted, verb
from sinklens.core.errors import UsageError
from sinklens.core.figures import Estimate, Figure, Intervals, Tile
from sinklens.core.papers import VISUAL_SINKS
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import Trace

from .base import Analyzer, Finding, Status, registry
from .visual import NO_PICTURES, Pictured, decided, no_rule, rule_of, sources_of, with_pictures

DRAWS, SEED = 2000, 0


@registry.register("background-share")
@dataclass(frozen=True)
class BackgroundShare(Analyzer):
    """The share of visual sinks on the background, beside the share of all visual tokens there.

    How it is computed: masks that came with the pictures say which part of each token's cell shows an object; a token
    whose part is below `covered` is background. Over all prompts with masks, the share of visual sinks that are
    background stands beside the same of all visual tokens, its base rate. A token counts once if it is a sink of any
    layer; rows repeat it layer by layer. The interval of the difference is a bootstrap over prompts, so sinks of one
    picture count together. Found means that the interval lies above 0.

    Compared with the paper: Kang et al. give the share of sinks outside of segmentation masks beside that of all visual
    tokens, with LLaVA-1.5-7B 90.5 % against 82.9 % on PASCAL VOC and 93.7 % against 90.5 % on COCO, as others quote it.
    From how much of a cell on a token counts as object is not known of the paper, and the official code does not
    compute it. Interval and rule for "found" are ours.

    When not to trust it: on pictures that are nearly all background every token is on it, which is why the base rate
    stands beside. Masks that leave objects out make background of them. Few pictures make wide intervals. Cells outside
    of the picture (padding) are left out of both shares.

    Args:
        covered: Least part of a cell that makes it an object.
        level: Of the interval.
    """

    covered: float = 0.5
    level: float = 0.95

    name = "background-share"
    title = "Visual sinks on the background"
    place = 17
    of_pictures = True
    formula = (
        '<math display="block"><mi>Δ</mi><mo>=</mo><mi>P</mi><mo>(</mo><mtext>background</mtext><mo>|</mo><mtext>sink'
        "</mtext><mo>)</mo><mo>−</mo><mi>P</mi><mo>(</mo><mtext>background</mtext><mo>)</mo></math>"
    )
    needs = frozenset({sig.PHI, sig.OBJECT_SHARE})
    summarises = (
        "n_prompts", "sinks", "tokens", "background", "base_rate", "difference", "ci_low", "ci_high",
        "enrichment",
    )  # fmt: skip
    reference = VISUAL_SINKS.at("share of visual sinks on the background")

    def __post_init__(self) -> None:
        if not 0 < self.covered <= 1 or not 0 < self.level < 1:
            raise UsageError(
                "background-share takes covered above 0 and at most 1, and level between 0 and 1.",
                detail=f"Got covered={self.covered:g}, level={self.level:g}.",
            )

    def analyze(self, trace: Trace) -> Finding:
        records = with_pictures(trace)
        if not records:
            return self.not_applicable(NO_PICTURES)
        rule = rule_of(trace)
        reason = no_rule(rule)
        if rule is None or reason is not None:
            return self.not_applicable(reason or "")
        seen = [
            decided(record, rule, rule)
            for record in records
            if sig.OBJECT_SHARE.name in record.arrays and sig.PHI.name in record.arrays
        ]
        if not seen:
            return self.not_applicable(
                "no picture came with a mask. A JSONL file names one beside each picture, where an object is not black."
            )
        counts = [self.counts(item, item.sink_somewhere()) for item in seen]
        total = Share.over(counts, self.level)
        if not total.sinks:
            return self.not_applicable(
                f"no visual token that a mask covers is a sink. Sink {sources_of(rule.dims)}; visual-sinks "
                "has the numbers."
            )
        rows = self._rows(seen)
        found = total.low > 0
        return self.finding(
            Status.FOUND if found else Status.NOT_FOUND,
            _verdict(total, len(seen), found, self.level),
            rows=rows,
            summary={"n_prompts": len(seen), **total.row()},
            units=UNITS,
            labels=LABELS,
            figures=[_figure(rows, total, len(seen), self.level)],
            tiles=[
                Tile(
                    "Sinks on background",
                    f"{100 * total.share:.0f} %",
                    f"all tokens {100 * total.base:.0f} %",
                    link=self.name,
                )
            ],
            notes=_notes(seen, len(records)),
        )

    def counts(self, item: Pictured, sinks: Bool[np.ndarray, " pos"]) -> tuple[int, int, int, int]:
        """Sinks, sinks on background, visual tokens, visual tokens on background; of those with a known cell."""
        part = item.record[sig.OBJECT_SHARE]
        known = item.visual & ~np.isnan(part)
        background = known & (np.nan_to_num(part) < self.covered)
        chosen = known & sinks
        return int(chosen.sum()), int((chosen & background).sum()), int(known.sum()), int(background.sum())

    def _rows(self, seen: list[Pictured]) -> list[dict[str, Any]]:
        rows = []
        for layer in range(len(seen[0].sinks)):
            share = Share.over([self.counts(item, item.visual_sinks()[layer]) for item in seen], self.level)
            if share.sinks:
                rows.append({"layer": layer, **share.row()})
        return sorted(rows, key=lambda row: (-row["difference"], row["layer"]))


@dataclass(frozen=True)
class Share:
    """Shares of the background, and the interval of their difference."""

    sinks: int
    tokens: int
    share: float
    base: float
    low: float
    high: float

    @classmethod
    def over(cls, counts: list[tuple[int, int, int, int]], level: float) -> Share:
        """Pooled over prompts; the interval draws prompts with replacement."""
        table = np.array(counts, dtype=np.float64)
        draws = np.random.default_rng(SEED).integers(len(table), size=(DRAWS, len(table)))
        differences = _difference(table[draws].sum(1))
        known = differences[~np.isnan(differences)]
        low, high = (
            np.quantile(known, [(1 - level) / 2, (1 + level) / 2]) if len(known) else (math.nan, math.nan)
        )
        sinks, dark, tokens, all_dark = table.sum(0)
        return cls(
            int(sinks),
            int(tokens),
            float(dark / sinks) if sinks else math.nan,
            float(all_dark / tokens) if tokens else math.nan,
            float(low),
            float(high),
        )

    def row(self) -> dict[str, Any]:
        return {
            "sinks": self.sinks,
            "tokens": self.tokens,
            "background": self.share,
            "base_rate": self.base,
            "difference": self.share - self.base,
            "ci_low": self.low,
            "ci_high": self.high,
            "enrichment": self.share / self.base if self.base else None,
        }


def _difference(sums: Float[np.ndarray, "draw 4"]) -> Float[np.ndarray, " draw"]:
    sinks, dark, tokens, all_dark = sums.T
    known = (sinks > 0) & (tokens > 0)
    share = np.divide(dark, sinks, out=np.full(len(sums), np.nan), where=known)
    return share - np.divide(all_dark, tokens, out=np.full(len(sums), np.nan), where=known)


UNITS = {
    "sinks": "visual sinks whose cell a mask covers",
    "tokens": "visual tokens whose cell a mask covers",
    "background": "share of the sinks on the background",
    "base_rate": "share of all visual tokens on the background",
    "difference": "sinks less all tokens, share",
    "ci_low": "of the difference, bootstrap over prompts",
    "ci_high": "of the difference, bootstrap over prompts",
    "enrichment": "sinks over all tokens",
}
LABELS = {
    "background": "sinks on the background",
    "base_rate": "all visual tokens on the background",
    "covered": "least object part of a cell",
    "level": "level of the interval",
}


def _verdict(total: Share, prompts: int, found: bool, level: float) -> str:
    size = (
        f"{100 * total.share:.1f} % of the {total.sinks} visual sinks and {100 * total.base:.1f} % of all "
        "visual tokens are "
        f"on the background ({counted(prompts, 'prompt')}; difference {100 * (total.share - total.base):+.1f} points, "
        f"{100 * level:g} % interval {100 * total.low:+.1f} to {100 * total.high:+.1f})"
    )
    if found:
        return f"Visual sinks stand on the background more often than chance has it: {size}."
    return (
        f"Visual sinks are not shown to stand on the background more often than other visual tokens: {size}."
    )


def _figure(rows: list[dict[str, Any]], total: Share, prompts: int, level: float) -> Figure:
    entries = [
        Estimate(
            "any layer", total.share - total.base, total.low, total.high, note=counted(total.sinks, "sink")
        )
    ]
    entries += [
        Estimate(
            f"layer {row['layer']}",
            row["difference"],
            row["ci_low"],
            row["ci_high"],
            note=counted(row["sinks"], "sink"),
        )
        for row in sorted(rows, key=lambda row: row["layer"])
    ]
    return Intervals(
        "difference",
        "Sinks on the background beyond the base rate",
        f"Share of visual sinks on the background less that of all visual tokens, pooled over "
        f"{counted(prompts, 'prompt')} with masks.",
        tuple(entries),
        "difference of shares",
        interval=f"{100 * level:g} % bootstrap interval over prompts",
        reference_label="no difference",
    )


def _notes(seen: list[Pictured], pictured: int) -> list[str]:
    left = pictured - len(seen)
    were = verb(left, "was", "were")
    notes = [f"{counted(left, 'prompt')} without a mask {were} left out."] if left else []
    if len(seen) < 10:
        notes.append(f"{counted(len(seen), 'prompt')} with masks: too few for an interval.")
    return notes
