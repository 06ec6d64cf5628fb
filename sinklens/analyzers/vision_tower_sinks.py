"""Sinks of the vision tower: patches with outlying norms, and whether they become sinks of the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from sinklens.core.counts import counted, verb
from sinklens.core.errors import UsageError
from sinklens.core.figures import Tile
from sinklens.core.papers import VISION_SINKS
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord, Trace

from .base import Analyzer, Finding, Status, registry
from .propagation import Table, by_placement, table
from .vision_tower import Tower, above_gap, attention_ratios, members_known, patch_places
from .vision_tower_figures import draw
from .visual import NO_PICTURES, cells, decided, no_rule, rule_of, with_pictures

LAST = -1


@registry.register("vision-tower-sinks")
@dataclass(frozen=True)
class VisionTowerSinks(Analyzer):
    """Patches whose norm in the vision tower is far out, and how many of them are sinks of the language model too.

    How it is computed: after each block of the vision tower, patches whose norm exceeds the median over the patches of
    the prompt's pictures by `mads` median absolute deviations, and `least` times, are its sinks (rule="mad"), or
    those above the widest step in the sorted norms, if it is at least `gap` times and leaves at most a tenth above
    (rule="gap"). A fixed `tau_vit` replaces both. Class token and registers are no patches: they take no part, and a
    note says how large they are. A token of the language model is a vision-tower sink if any of the patches merged
    into it is; `members` says how many are. The main figures are those of the block whose output the language model is
    given, as far as the config names it, else of the last; a row says in which blocks a token is one. Whether they
    propagate is a table: tokens that are a sink of the tower, of the language model (any layer), of both, of neither,
    beside the number that would be both if sinks of the language model fell on the tokens of their picture at random.

    Compared with the paper: its threshold of 100 holds for the CLIP encoder of LLaVA-1.5-7B; norms of other encoders
    are of another size, so the rules here set it by the tower itself, and tau_vit=100 repeats the paper. It reports 3
    to 5 such tokens per picture that get about seven times the attention of others. Where a code is known the fixed
    threshold is used, so there is one recipe. The random placement and the rule for "found" (any sink) are ours.

    When not to trust it: the norm of the last blocks can be large for other reasons, for instance at the edge of padded
    pictures. Blocks that attend within windows have their own outliers. An average over layers hides that attention to
    these tokens is high in a few early layers only, so ratios are given layer by layer. Without sink dims of the
    language model nothing is said of propagation.

    Args:
        mads: Median absolute deviations above the median.
        least: Least norm in units of the median.
        gap: Least step between the norms of sinks and of others.
        tau_vit: Absolute threshold; 0 leaves it to the rule.
    """

    rule: Literal["mad", "gap"] = "mad"
    mads: float = 10.0
    least: float = 2.0
    gap: float = 1.5
    tau_vit: float = 0.0

    name = "vision-tower-sinks"
    title = "Sinks of the vision tower"
    place = 13
    of_pictures = True
    formula = (
        '<math display="block"><mo>‖</mo><msub><mi>x</mi><mi>j</mi></msub><mo>‖</mo><mo>&gt;</mo><mi>'
        "median</mi><mo>+</mo>"
        "<mi>k</mi><mi>MAD</mi></math>"
    )
    needs = frozenset({sig.VISION_NORM, sig.VISION_RECEIVED, sig.PHI, sig.TEXT_RECEIVED})
    summarises = (
        "n_prompts", "n_pictures", "n_visual", "block", "n_sinks", "per_picture", "attention_ratio_max",
        "attention_ratio_layer", "both", "tower_only", "llm_only", "neither", "both_by_chance", "p_value",
    )  # fmt: skip
    reference = VISION_SINKS.at("high-norm tokens of the vision encoder and their propagation")

    def __post_init__(self) -> None:
        if self.rule not in ("mad", "gap"):
            raise UsageError(f"Unknown rule {self.rule!r} of vision-tower-sinks.", detail="It has: mad, gap.")
        if self.mads <= 0 or self.gap <= 1 or self.least < 1 or self.tau_vit < 0:
            raise UsageError(
                "vision-tower-sinks takes mads above 0, least of 1 or more, gap above 1 and tau_vit of 0 or more.",
                detail=f"Got mads={self.mads:g}, least={self.least:g}, gap={self.gap:g}, tau_vit={self.tau_vit:g}.",
            )

    def analyze(self, trace: Trace) -> Finding:
        records = with_pictures(trace)
        if not records:
            return self.not_applicable(NO_PICTURES)
        records = [record for record in records if sig.VISION_NORM.name in record.arrays]
        if not records:
            return self.not_applicable(
                "the model has no vision tower whose blocks could be read, or it was not recorded."
            )
        records = [record for record in records if members_known(record)]
        if not records:
            return self.not_applicable(
                "it is not known which patches of the vision tower make which visual token."
            )
        block = int(trace.tracing.get("vision_feature_layer", LAST))
        seen = [self._tower(record, block) for record in records]
        crossed = _crossed(trace, seen)
        rows = [row for item in seen for row in _rows(item)]
        rows.sort(key=lambda row: (-row["ratio"], row["prompt"], row["position"]))
        summary = _summary(seen, rows, crossed)
        return self.finding(
            Status.FOUND if rows else Status.NOT_FOUND,
            _verdict(summary, self._words(), crossed),
            rows=rows,
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=draw(seen, rows, crossed, self._words()),
            tiles=[
                Tile(
                    self.title,
                    f"{summary['per_picture']:.2g} per picture" if rows else "none",
                    self._words(),
                    link=self.name,
                )
            ],
            notes=_notes(trace, seen, crossed),
        )

    def _words(self) -> str:
        if self.tau_vit:
            return f"norm of at least {self.tau_vit:g}"
        if self.rule == "gap":
            return f"norm above a step of at least {self.gap:g} times"
        return f"norm {self.mads:g} MAD above the median and {self.least:g} times as large"

    def _tower(self, record: PromptRecord, block: int) -> Tower:
        assert record.spans is not None
        norms = record[sig.VISION_NORM].astype(np.float64)
        patches = patch_places(record.spans, norms.shape[1])
        out = np.zeros(norms.shape, dtype=bool)
        for layer, norm in enumerate(norms):
            if not np.isnan(norm[patches]).any():
                out[layer, patches] = self.outliers(norm[patches])
        block = block if -len(norms) <= block < len(norms) else LAST
        return Tower(record, record.spans, norms, patches, out, block % len(norms))

    def outliers(self, norm: Float[np.ndarray, " patch"]) -> Bool[np.ndarray, " patch"]:
        """Which patches of one block are sinks."""
        if self.tau_vit:
            return norm >= self.tau_vit
        if self.rule == "gap":
            return above_gap(norm, self.gap)
        median = float(np.median(norm))
        # Patches that are all alike have no spread to measure by; a thousandth of the median stands in for it.
        spread = max(float(np.median(abs(norm - median))), 1e-3 * median)
        return norm > max(median + self.mads * spread, self.least * median)


UNITS = {
    "prompt": "index of the prompt",
    "image": "which picture of the prompt",
    "row": "of the grid of tokens",
    "col": "of the grid of tokens",
    "position": "token position",
    "norm": "L2 norm of its largest patch, after the block that the language model is given",
    "ratio": "that over the median of all patches",
    "members": "patches of the token that are sinks",
    "of_members": "patches of the token",
    "first_block": "first block of the tower after which it is one",
    "last_block": "last such block",
    "vision_share": "attention its patches receive in that block over the mean of all patches",
    "llm_sink": "whether it is a sink of the language model in some layer",
}
LABELS = {
    "image": "picture",
    "per_picture": "sinks of the tower per picture",
    "of_members": "patches merged",
    "vision_share": "attention in the tower, over the mean",
    "llm_sink": "sink of the language model",
    "both": "sinks of both",
    "tower_only": "of the vision tower only",
    "llm_only": "of the language model only",
    "neither": "of neither",
    "both_by_chance": "of both if placed at random",
    "p_value": "p, random placement",
    "attention_ratio_max": "attention of the text, sinks over others, largest layer",
    "attention_ratio_layer": "in layer",
    "mads": "MADs above the median",
    "least": "least norm over the median",
    "tau_vit": "absolute threshold, 0 for none",
}


def _crossed(trace: Trace, seen: list[Tower]) -> list[Bool[np.ndarray, " pos"]] | None:
    """Which tokens are sinks of the language model, per prompt; None where that is not known."""
    rule = rule_of(trace)
    if rule is None or no_rule(rule) or any(sig.PHI.name not in item.record.arrays for item in seen):
        return None
    return [decided(item.record, rule, rule).sink_somewhere() for item in seen]


def _rows(item: Tower) -> list[dict[str, Any]]:
    tokens = item.tokens()
    norm, out = item.norms[item.block], item.out[item.block]
    median = float(np.median(norm[item.patches]))
    received = (
        item.record[sig.VISION_RECEIVED][item.block]
        if sig.VISION_RECEIVED.name in item.record.arrays
        else None
    )
    rows = []
    for picture, grid, row, col, position in cells(item.spans):
        if not tokens[item.block, position]:
            continue
        assert grid.members is not None
        places = grid.members[row, col]
        places = places[places >= 0]
        blocks = np.flatnonzero(tokens[:, position])
        share = None
        if received is not None and not np.isnan(received[item.patches]).any():
            share = float(received[places[out[places]]].mean() / received[item.patches].mean())
        rows.append(
            {
                "prompt": item.record.index,
                "image": picture,
                "name": item.spans.pictures[picture].name,
                "view": grid.view,
                "row": row,
                "col": col,
                "position": position,
                "norm": float(norm[places].max()),
                "ratio": float(norm[places].max() / median) if median > 0 else float("inf"),
                "members": int(out[places].sum()),
                "of_members": len(places),
                "first_block": int(blocks[0]),
                "last_block": int(blocks[-1]),
                "vision_share": share,
            }
        )
    return rows


def _summary(
    seen: list[Tower], rows: list[dict[str, Any]], crossed: list[np.ndarray] | None
) -> dict[str, Any]:
    pictures = sum(len(item.spans.pictures) for item in seen)
    summary: dict[str, Any] = {
        "n_prompts": len(seen),
        "n_pictures": pictures,
        "n_visual": sum(int(item.spans.visual.sum()) for item in seen),
        "block": seen[0].block,
        "n_sinks": len(rows),
        "per_picture": len(rows) / pictures,
        **_attention(seen),
    }
    if crossed is not None:
        found = _table(seen, crossed)
        summary |= {**found.row(), "p_value": by_placement(_tables(seen, crossed))}
        for row in rows:
            at = next(i for i, item in enumerate(seen) if item.record.index == row["prompt"])
            row["llm_sink"] = bool(crossed[at][row["position"]])
    return summary


def _tables(seen: list[Tower], crossed: list[np.ndarray]) -> list[Table]:
    """A table for every picture."""
    tables = []
    for item, llm in zip(seen, crossed, strict=True):
        tower = item.tokens()[item.block]
        for picture in range(len(item.spans.pictures)):
            positions = np.array([p for pic, *_, p in cells(item.spans) if pic == picture], dtype=np.int64)
            tables.append(table(tower[positions], llm[positions]))
    return tables


def _table(seen: list[Tower], crossed: list[np.ndarray]) -> Table:
    return sum(_tables(seen, crossed), Table(0, 0, 0, 0, 0.0))


def _attention(seen: list[Tower]) -> dict[str, Any]:
    """The layer in which the text gives vision-tower sinks most beside other visual tokens; no mean over layers."""
    ratios = attention_ratios(seen)
    if ratios is None or np.isnan(ratios).all():
        return {"attention_ratio_max": None, "attention_ratio_layer": None}
    return {
        "attention_ratio_max": float(np.nanmax(ratios)),
        "attention_ratio_layer": int(np.nanargmax(ratios)),
    }


def _verdict(summary: dict[str, Any], words: str, crossed: list[np.ndarray] | None) -> str:
    pictures = counted(summary["n_pictures"], "picture")
    after = f"after block {summary['block']} of the vision tower"
    if not summary["n_sinks"]:
        return f"No sink of the vision tower: {after} no patch of {pictures} has a {words}."
    text = (
        f"{counted(summary['n_sinks'], 'visual token')} of {pictures} "
        f"({summary['per_picture']:.2g} per picture) {verb(summary['n_sinks'], 'holds', 'hold')} a patch with a "
        f"{words}, {after}."
    )
    if crossed is not None:
        chance = summary["both_by_chance"]
        text += (
            f" {summary['both']} of them {verb(summary['both'], 'is a sink', 'are sinks')} of the language model too, "
            f"{chance:.2g} would be by chance (p = {summary['p_value']:.2g}, random placement within each "
            "picture); it has "
            f"{counted(summary['llm_only'], 'other visual sink')}."
        )
    if summary["attention_ratio_max"] is not None:
        text += (
            f" The text gives each up to {summary['attention_ratio_max']:.2g} times the attention of another visual "
            f"token (layer {summary['attention_ratio_layer']})."
        )
    return text


def _notes(trace: Trace, seen: list[Tower], crossed: list[np.ndarray] | None) -> list[str]:
    notes = []
    others = [np.setdiff1d(np.arange(item.norms.shape[1]), item.patches) for item in seen]
    if len(others[0]):
        ratio = np.mean(
            [item.norms[item.block][rest].max() / np.median(item.norms[item.block][item.patches])
             for item, rest in zip(seen, others, strict=True)]
        )  # fmt: skip
        notes.append(
            f"{counted(len(others[0]), 'place')} of the tower's sequence "
            f"{verb(len(others[0]), 'becomes', 'become')} no "
            f"token (class token, registers, cut patches); the largest norm there is {ratio:.3g} times the "
            "median patch."
        )
    if "vision_feature_layer" not in trace.tracing:
        notes.append(
            "The config names no block whose output the language model is given; the last one was taken."
        )
    if crossed is None:
        notes.append(
            f"Nothing is said of the language model's sinks: {no_rule(rule_of(trace)) or 'φ was not recorded.'}"
        )
    return notes
