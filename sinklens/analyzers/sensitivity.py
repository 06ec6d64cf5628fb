"""Structural or prompt-dependent: the same verdict under other inputs, lengths and precisions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from sinklens.core.counts import counted
from sinklens.core.figures import Estimate, Intervals, Tile
from sinklens.core.papers import WHEN_SINKS_EMERGE
from sinklens.tracers.trace import Trace

from .base import TRUTH, Analyzer, Finding, Status, registry

DTYPE, LENGTH, REPEATED = "dtype", "length", "with one token repeated"
STRUCTURAL, DEPENDS, ABSENT = "structural", "prompt-dependent", "no sink"
NUMERIC, BY_LENGTH = "precision-dependent", "length-dependent"
DRAWS = 2000


@registry.register("sensitivity")
@dataclass(frozen=True)
class Sensitivity(Analyzer):
    """Whether the sink belongs to the model or to the prompts: the same measurement under other inputs.

    How it is computed: the first prompts of the run are measured as the run measured them, then with the BOS token
    taken away or added, with or without the chat template, with random tokens in place of the text, with one token
    repeated, at other lengths (texts are cut or, where they are too short, joined with nothing between them; a BOS
    stands at the start only, as several of them share what a sink receives), and with the model in other dtypes.
    Every variant is judged by the rule of primary sinks with the run's epsilon; its rate is that of its own strongest
    position. The difference to the run's own protocol is paired over prompts where the variant keeps them (text in,
    text out), else between two independent samples; its 95 % interval is a seeded bootstrap over prompts. The sink is
    called structural if no variant that has a vote loses it or moves it; prompt-dependent if a variant of the input
    does; length-dependent if only other lengths do, precision-dependent if only other dtypes do.
    If the run has no sink, and no variant has one, there is none to depend on anything.

    Compared with the paper: Gu et al. compare natural, random and repeated tokens at 64 tokens with epsilon 0.3. They
    give rates; the rule that turns differences into words is ours. There is no official code for this comparison
    beyond the sink rate itself, so there is one recipe.

    When not to trust it: few prompts are used, so small differences are not seen; read the intervals. Rates at
    different lengths differ by their definition, because uniform attention over few keys is a larger share: a
    difference of rates between lengths says little, and a length at which the rule finds no sink may be one at which
    a weak sink falls below epsilon; its `lift` over uniform attention tells. Where the run's own prompts hold several
    BOS tokens (joined texts), other lengths differ in that as well and have no vote. One repeated token makes all
    positions equal, so that the share of each collapses in models without learned positions although all of them
    carry the same hidden state; that variant has no vote, and `alike` says how many positions do.

    Args:
        min_change: Difference of rates, in percentage points, that is called a change of strength; its interval must
            also exclude zero.
    """

    min_change: float = 10.0

    name = "sensitivity"
    title = "Sensitivity to the input"
    place = 90
    formula = (
        '<math display="block"><mi>Δ</mi><mo>=</mo><munder><mi>mean</mi><mtext>prompts</mtext></munder><mo>(</mo>'
        "<msup><mi>Sink</mi><mi>ε</mi></msup><mo>[</mo><mtext>variant</mtext><mo>]</mo><mo>−</mo><msup><mi>Sink</mi>"
        "<mi>ε</mi></msup><mo>[</mo><mtext>run</mtext><mo>]</mo><mo>)</mo></math>"
    )
    needs = frozenset()
    summarises = (
        "kind", "sink_rate", "sink_rate_ci_low", "sink_rate_ci_high", "share", "position", "found",
        "n_prompts", "seq_len", "epsilon", "dtype", "variants", "variants_run", "depends_on",
        "appears_with", "strength_depends_on",
    )  # fmt: skip
    answers = (("found", TRUTH), ("kind", (STRUCTURAL, DEPENDS, ABSENT, NUMERIC, BY_LENGTH)))
    reference = WHEN_SINKS_EMERGE.at("3, attention sink under different inputs")

    def analyze(self, trace: Trace) -> Finding:
        result = trace.manifest.get("experiments", {}).get("sensitivity")
        if not result:
            skipped = trace.manifest.get("experiments_skipped", {}).get("sensitivity")
            reason = skipped or "It was not run; add --sensitivity."
            # No tile: what nobody asked for takes no room on the first screen.
            return self.finding(Status.NOT_APPLICABLE, f"Not applicable: {reason}", reason=reason)
        base = result["base"]
        rows = [_row(entry, base) for entry in result["variants"]]
        summary = self._summary(result, rows)
        return self.finding(
            Status.FOUND if summary["depends_on"] or summary["appears_with"] else Status.NOT_FOUND,
            _verdict(summary, rows),
            rows=rows,
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=[_strip(base, rows, summary)],
            tiles=[_tile(summary)],
            notes=_notes(rows, summary),
        )

    def _summary(self, result: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        base = result["base"]
        ran = [row for row in rows if row["skipped"] is None]
        voting = [row for row in ran if row["votes"]]
        lost = [row for row in voting if base["found"] and not same_sink(row, base)]
        gained = [row for row in voting if not base["found"] and row["found"]]
        stronger = [row for row in voting if row not in lost + gained and self._changed(row)]
        low, high = interval(np.array(base["rate"]))
        return {
            "kind": kind_of(bool(base["found"]), lost, gained),
            "sink_rate": float(np.mean(base["rate"])),
            "sink_rate_ci_low": low,
            "sink_rate_ci_high": high,
            "share": float(np.mean(base["share"])),
            "position": base["position"],
            "found": base["found"],
            "n_prompts": len(base["rate"]),
            "seq_len": base["seq_len"],
            "epsilon": result["analyzer"]["epsilon"],
            "dtype": result["dtype"],
            "variants": len(rows),
            "variants_run": len(ran),
            "depends_on": [row["variant"] for row in lost],
            "appears_with": [row["variant"] for row in gained],
            "strength_depends_on": [row["variant"] for row in stronger],
        }

    def _changed(self, row: dict[str, Any]) -> bool:
        if row["group"] == LENGTH or row["delta_low"] is None:
            return False
        apart = row["delta_low"] > 0 or row["delta_high"] < 0
        return apart and abs(row["delta"]) >= self.min_change


UNITS = {
    "rate": "% of (prompt, layer, head) with share > epsilon, strongest position of the variant",
    "share": "share of attention (0-1) of that position",
    "delta": "percentage points, variant minus run",
    "position_rate": "% at the position that is strongest in the run",
    "lift": "ratio to uniform attention",
    "alike": "share of positions whose hidden state is at least half as long as that of the run's strongest position",
    "seq_len": "tokens, median",
}

LABELS = {
    "kind": "the sink is",
    "sink_rate": "sink rate as the run",
    "share": "attention received",
    "found": "sink found",
    "variants": "variants in all",
    "variants_run": "variants run",
    "depends_on": "lost",
    "appears_with": "gained",
    "strength_depends_on": "of another strength",
    "variant": "what differs",
    "group": "kind",
    "votes": "counts for the verdict",
    "rate": "sink rate",
    "delta": "difference to the run",
    "paired": "paired over prompts",
    "position_rate": "sink rate at the run's position",
    "alike": "positions like the run's strongest",
    "skipped": "why not run",
    "min_change": "least change of strength",
}


def kind_of(found: bool, lost: list[dict[str, Any]], gained: list[dict[str, Any]]) -> str:
    """The rule: what loses or gains the sink decides the word."""
    changed = lost if found else gained
    if not changed:
        return STRUCTURAL if found else ABSENT
    groups = {row["group"] for row in changed}
    return NUMERIC if groups == {DTYPE} else BY_LENGTH if groups == {LENGTH} else DEPENDS


def same_sink(row: dict[str, Any], base: dict[str, Any]) -> bool:
    """Whether a variant has the sink at the place where the run has it."""
    return bool(row["found"]) and row["position"] == base["position"]


def _row(entry: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    said = {"variant": entry["label"], "group": entry["group"], "votes": entry["votes"]}
    if "skipped" in entry:
        empty = dict.fromkeys(
            ("found", "position", "token", "rate", "rate_low", "rate_high", "share", "lift", "delta")
        )
        rest = dict.fromkeys(
            ("delta_low", "delta_high", "paired", "position_rate", "alike", "n_prompts", "seq_len")
        )
        return {**said, **empty, **rest, "skipped": entry["skipped"], "note": entry["note"]}
    low, high = interval(np.array(entry["rate"]))
    delta, delta_low, delta_high, paired = difference(entry, base)
    return {
        **said,
        "found": entry["found"],
        "position": entry["position"],
        "token": entry["token"],
        "rate": float(np.mean(entry["rate"])),
        "rate_low": low,
        "rate_high": high,
        "share": float(np.mean(entry["share"])),
        "lift": entry.get("lift"),
        "delta": delta,
        "delta_low": delta_low,
        "delta_high": delta_high,
        "paired": paired,
        "position_rate": float(np.mean(entry["position_rate"])),
        "alike": float(np.mean(entry["alike"])) if entry.get("alike") else None,
        "n_prompts": len(entry["rate"]),
        "seq_len": entry["seq_len"],
        "skipped": None,
        "note": entry["note"],
    }


def interval(values: np.ndarray) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of a mean over prompts, seeded; None for fewer than two."""
    if len(values) < 2:
        return None, None
    draws = np.random.default_rng(0).choice(values, (DRAWS, len(values))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def difference(entry: dict[str, Any], base: dict[str, Any]) -> tuple[float, float | None, float | None, bool]:
    """Mean rate of a variant minus the run's, its interval, and whether it is paired over prompts."""
    plain = {source.removeprefix("made from "): rate for source, rate in _by_source(entry)}
    before = dict(_by_source(base))
    both = [source for source in before if source in plain]
    if len(both) == len(before) == len(plain) and len(both) == len(entry["rate"]) == len(base["rate"]):
        apart = np.array([plain[source] - before[source] for source in both])
        return float(apart.mean()), *interval(apart), True
    one, other = np.array(entry["rate"]), np.array(base["rate"])
    delta = float(one.mean() - other.mean())
    if min(len(one), len(other)) < 2:
        return delta, None, None, False
    generator = np.random.default_rng(0)
    draws = generator.choice(one, (DRAWS, len(one))).mean(1) - generator.choice(
        other, (DRAWS, len(other))
    ).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return delta, float(low), float(high), False


def _by_source(entry: dict[str, Any]) -> list[tuple[str, float]]:
    return list(zip(entry["sources"], entry["rate"], strict=True))


WORDS = {
    DEPENDS: "depends on the prompts",
    NUMERIC: "depends on the precision",
    BY_LENGTH: "depends on the length of the prompts",
}
RULE_FINDS_NONE = "the same rule finds no sink"


def _verdict(summary: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    ran = f"{summary['variants_run']} other ways of feeding the model"
    kind = summary["kind"]
    if kind == ABSENT:
        return f"No sink under any of {ran}."
    if not summary["found"]:
        return f"The run has no sink, but one appears: {_join(summary['appears_with'])}."
    stronger = summary["strength_depends_on"]
    varies = f" Its strength changes: {_join(stronger)}." if stronger else ""
    if kind == STRUCTURAL:
        return f"The sink is structural: it stays on position {summary['position']} under {ran}.{varies}"
    lost = [row for row in rows if row["variant"] in summary["depends_on"]]
    told = [_loss(row, summary) for row in lost if row["group"] != LENGTH]
    other = [row for row in lost if row["group"] == LENGTH]
    if len(other) > 1 and not any(row["found"] for row in other):
        told.append(
            f"{_join([row['variant'] for row in other])} {RULE_FINDS_NONE}{' either' if told else ''}"
        )
    else:
        told += [_loss(row, summary) for row in other]
    return f"The sink {WORDS[kind]}: {'; '.join(told)}.{varies}"


def _loss(row: dict[str, Any], summary: dict[str, Any]) -> str:
    if row["found"]:
        return f"{row['variant']} it moves from position {summary['position']} to {row['position']}"
    gone = RULE_FINDS_NONE if row["group"] == LENGTH else "it is gone"
    return f"{row['variant']} {gone} (rate {summary['sink_rate']:.1f} % to {row['rate']:.1f} %)"


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _tile(summary: dict[str, Any]) -> Tile:
    note = f"{summary['variants_run']} variants, {counted(summary['n_prompts'], 'prompt')}"
    return Tile("Sensitivity", summary["kind"], note, link="sensitivity")


def _notes(rows: list[dict[str, Any]], summary: dict[str, Any]) -> list[str]:
    notes = [f"Not run, {row['variant']}: {row['skipped']}" for row in rows if row["skipped"] is not None]
    ran = [row for row in rows if row["skipped"] is None]
    whose = "the sink's" if summary["found"] else "that of the run's strongest position"
    for row in ran:
        if row["variant"] == REPEATED and row["alike"] is not None:
            notes.append(
                f"With one token repeated, {100 * row['alike']:.0f} % of the positions carry a hidden state at least "
                f"half as long as {whose}; the rate of a single position then says nothing."
            )
        if (
            row["group"] == LENGTH
            and row["variant"] in summary["depends_on"]
            and row["lift"]
            and not row["found"]
        ):
            notes.append(
                f"{_sentence(row['variant'])} position {row['position']} receives {row['lift']:.1f} times the share of "
                "uniform attention, without passing the rule of primary sinks; shares fall with length by definition."
            )
    told = dict.fromkeys(row["note"] for row in ran if row["note"] and row["variant"] != REPEATED)
    return notes + list(told)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _strip(base: dict[str, Any], rows: list[dict[str, Any]], summary: dict[str, Any]) -> Intervals:
    low, high = summary["sink_rate_ci_low"], summary["sink_rate_ci_high"]
    own = Estimate(
        "as the run", summary["sink_rate"], _known(low), _known(high), group="run", note=_place(base)
    )
    drawn = [
        Estimate(
            row["variant"],
            _known(row["rate"]),
            _known(row["rate_low"]),
            _known(row["rate_high"]),
            note="not run" if row["skipped"] is not None else _place(row),
            group=row["group"],
        )
        for row in rows
    ]
    return Intervals(
        "strip",
        "Sink rate under other inputs, lengths and precisions",
        f"Mean over prompts of the share of (layer, head) whose attention to the strongest position exceeds "
        f"{summary['epsilon']:g}. The line is the run's own protocol. Rates of different lengths differ by definition.",
        (own, *drawn),
        "sink rate, %",
        interval="95 % bootstrap interval over prompts",
        reference=summary["sink_rate"],
        reference_label="as the run",
    )


def _place(row: dict[str, Any]) -> str:
    return f"on position {row['position']}" if row["found"] else "no sink"


def _known(value: float | None) -> float:
    return math.nan if value is None else float(value)
