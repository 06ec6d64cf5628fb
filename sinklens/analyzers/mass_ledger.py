"""Mass ledger: how much of the attention goes to text sinks, visual sinks, other visual tokens, and everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sinklens.core.counts import counted, verb
from sinklens.core.errors import UsageError
from sinklens.core.figures import Figure, Lines, Series, Tile
from sinklens.core.papers import VISUAL_SINKS
from sinklens.tracers import signals as sig
from sinklens.tracers.signals_pictures import QUERIES_RECEIVED
from sinklens.tracers.trace import Trace

from .base import Analyzer, Finding, Status, registry
from .key_groups import (
    AFTER_PICTURES,
    ATTENTION,
    EVERY_TOKEN,
    GROUPS,
    KEYS,
    STATES,
    TEXT_SINK,
    VISUAL_SINK,
    Grouped,
    grouped,
    learned,
    masses,
)
from .primary_sinks import PrimarySinks

TOLERANCE = 1e-3
"""How far groups and learned sinks may be from 1 together before a note says so."""


@registry.register("mass-ledger")
@dataclass(frozen=True)
class MassLedger(Analyzer):
    """Attention by whom it goes to: text sinks, visual sinks, visual tokens that are no sinks, and the rest.

    How it is computed: every token is in one group of every layer. Its mass is the attention that a query gives to all
    tokens of the group together, mean over queries, heads and prompts; of prompts with pictures the queries are the
    text after them, of texts all tokens. The groups of a layer add up to 1, less what a learned sink takes. With
    `rule="states"` a token is a sink of a layer if φ of the state that enters it reaches the threshold of the run; with
    `rule="attention"` in all layers, if primary-sinks names its position and some head of this prompt gives it more
    than 0.3. `auto` is `states` for prompts with pictures of a model with sink dims, else `attention`.

    Compared with the paper: Kang et al. tell visual and text sinks from other tokens by φ and sum the attention on them
    per head and query, to select heads; their program keeps no means of it. The ledger over queries, heads and layers,
    and the attention rule for models without sink dims, are of this package.

    When not to trust it: a mean over heads hides that few heads give a sink nearly everything. With few tokens every
    group is large: compare with the number of tokens in it. By the attention rule the first token can be no sink where
    its head gives it less than 0.3 and still get the largest mass. Under a mitigation that makes other tokens sinks the
    groups change; `mitigate` therefore holds those of the unchanged model.

    Args:
        rule: `auto`, `states` or `attention`.
    """

    rule: str = "auto"

    name = "mass-ledger"
    title = "Mass ledger"
    place = 18
    default = False
    formula = (
        '<math display="block"><msub><mi>M</mi><mi>g</mi></msub><mo>=</mo><munder><mi>mean</mi><mtext>prompts, layers, '
        "heads, queries</mtext></munder><mspace width='0.3em'/><munder><mo>∑</mo><mrow><mi>k</mi><mo>∈</mo><mi>g</mi>"
        "</mrow></munder><msub><mi>A</mi><mrow><mi>q</mi><mi>k</mi></mrow></msub><mo>,</mo><mspace width='1em'/>"
        "<munder><mo>∑</mo><mi>g</mi></munder><msub><mi>M</mi><mi>g</mi></msub><mo>=</mo><mn>1</mn></math>"
    )
    needs = PrimarySinks.needs | {sig.PHI, QUERIES_RECEIVED}
    optional = PrimarySinks.optional | {sig.PHI, QUERIES_RECEIVED}
    summarises = (
        "text_sink", "other", "text_sinks", "unaccounted", "rule", "queries", "n_prompts", "learned_sink",
        "visual_sink", "visual_nonsink", "visual_sinks",
    )  # fmt: skip
    answers = (("rule", (STATES, ATTENTION)), ("queries", (AFTER_PICTURES, EVERY_TOKEN)))
    reference = VISUAL_SINKS.at("text sinks, visual sinks and the attention on them")

    def __post_init__(self) -> None:
        if self.rule not in ("auto", STATES, ATTENTION):
            raise UsageError(f"mass-ledger: rule must be auto, states or attention, got {self.rule!r}.")

    def analyze(self, trace: Trace) -> Finding:
        if not any(layer.attention for layer in trace.layers):
            return self.not_applicable("the model has no softmax attention.")
        found = grouped(trace, self.rule)
        if isinstance(found, str):
            return self.not_applicable(found)
        mass = masses(trace, found)
        if not len(mass):
            return self.not_applicable(
                "no prompt has text after its pictures whose attention could be counted."
            )
        shares = ledger_table(trace, found)
        counts = _counts(trace, found)
        summary = _summary(shares, counts, found, len(mass))
        sinks = bool(summary["text_sinks"] or summary.get("visual_sinks"))
        return self.finding(
            Status.FOUND if sinks else Status.NOT_FOUND,
            _verdict(summary, found),
            rows=[{**row, **counts[row["layer"]]} for row in shares["layers"]],
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=[ledger_figure(shares, found)],
            tiles=[_tile(self.title, self.name, summary, found)],
            notes=_notes(summary, found),
        )


UNITS = {
    **dict.fromkeys(
        (*KEYS, "learned_sink"), "share of a query's attention (0-1), mean over queries, heads, prompts"
    ),
    "text_sinks": "tokens per prompt",
    "visual_sinks": "tokens per prompt",
    "unaccounted": "largest |1 - sum| of a layer",
}
LABELS = {
    **dict(
        zip(
            KEYS,
            (f"attention on {group}s" if group != "other" else "on the rest" for group in GROUPS),
            strict=True,
        )
    ),
    "learned_sink": "on learned sinks",
    "text_sinks": "text sinks",
    "visual_sinks": "visual sinks",
    "unaccounted": "unaccounted for",
    "rule": "sinks told by",
    "queries": "whose attention",
    "n_prompts": "prompts",
}


def ledger_table(trace: Trace, groups: Grouped) -> dict[str, Any]:
    """Masses by layer (`layers`: one row each) and over all layers (`total`), means over the prompts that take part."""
    mass, sink = masses(trace, groups), learned(trace, groups)
    per_layer = mass.mean(0)
    per_layer_sink = None if sink is None else sink.mean(0)
    rows = []
    for layer in np.flatnonzero(~np.isnan(per_layer[:, 0])).tolist():
        row: dict[str, Any] = {"layer": layer}
        row |= {KEYS[g]: float(per_layer[layer, g]) for g in groups.groups}
        if per_layer_sink is not None:
            row["learned_sink"] = float(per_layer_sink[layer])
        rows.append(row)
    keys = [key for key in rows[0] if key != "layer"] if rows else []
    return {"layers": rows, "total": {key: float(np.mean([row[key] for row in rows])) for key in keys}}


def _counts(trace: Trace, groups: Grouped) -> list[dict[str, float]]:
    """Sinks of each layer, mean over prompts."""
    found = []
    for layer in range(len(trace.layers)):
        kinds = {"text_sinks": TEXT_SINK} | ({"visual_sinks": VISUAL_SINK} if groups.visual else {})
        members = [member[layer] for member in groups.members.values()]
        found.append({key: float(np.mean([(m == g).sum() for m in members])) for key, g in kinds.items()})
    return found


def _summary(
    shares: dict[str, Any], counts: list[dict[str, float]], groups: Grouped, n: int
) -> dict[str, Any]:
    sums = [sum(value for key, value in row.items() if key != "layer") for row in shares["layers"]]
    layers = [row["layer"] for row in shares["layers"]]
    return {
        **shares["total"],
        **{key: float(np.mean([counts[layer][key] for layer in layers])) for key in counts[0]},
        "unaccounted": max(abs(1.0 - total) for total in sums),
        "rule": groups.rule,
        "queries": groups.queries,
        "n_prompts": n,
    }


def _verdict(summary: dict[str, Any], groups: Grouped) -> str:
    told = {KEYS[g]: GROUPS[g] for g in groups.groups}
    parts = [
        f"{100 * summary[key]:.1f} % to {'the rest' if name == 'other' else name + 's'}"
        for key, name in told.items()
    ]
    if "learned_sink" in summary:
        parts.append(f"{100 * summary['learned_sink']:.1f} % to learned sinks")
    which = "by their attention" if groups.rule == ATTENTION else "by their state"
    begin = "" if summary["text_sinks"] or summary.get("visual_sinks") else "No token is a sink. "
    return f"{begin}Of the attention of {groups.queries}, {', '.join(parts[:-1])} and {parts[-1]} (sinks {which})."


def _tile(title: str, name: str, summary: dict[str, Any], groups: Grouped) -> Tile:
    on_sinks = summary["text_sink"] + summary.get("visual_sink", 0.0)
    return Tile(title, f"{100 * on_sinks:.0f} %", f"of the attention of {groups.queries} on sinks", link=name)


def _notes(summary: dict[str, Any], groups: Grouped) -> list[str]:
    notes = []
    if summary["unaccounted"] > TOLERANCE:
        notes.append(
            f"A layer's groups differ from 1 by up to {summary['unaccounted']:.2g}: rows were changed and not "
            "renormalised, or statistics are missing."
        )
    if groups.left_out:
        notes.append(
            f"{counted(groups.left_out, 'prompt')} without pictures {verb(groups.left_out, 'was', 'were')} left out."
        )
    if groups.visual and groups.rule == ATTENTION:
        notes.append(
            "Sinks are told by the attention they receive: the model has no sink dims to tell them by."
        )
    return notes


def ledger_figure(
    shares: dict[str, Any], groups: Grouped, *, key: str = "by_layer", title: str = ""
) -> Figure:
    """The groups by layer."""
    rows = shares["layers"]
    layers = np.array([row["layer"] for row in rows])
    names = {KEYS[g]: GROUPS[g] for g in groups.groups} | {"learned_sink": "learned sink"}
    series = tuple(
        Series(name, layers, np.array([row[k] for row in rows]), emphasis=k == "text_sink")
        for k, name in names.items()
        if rows and k in rows[0]
    )
    return Lines(
        key,
        title or "Attention by group of keys, by layer",
        f"Share of the attention of {groups.queries}, mean over queries, heads and "
        f"{counted(len(groups.members), 'prompt')}.",
        series,
        "layer",
        "share",
    )
