"""Tokens in four groups, text sinks, visual sinks, other visual tokens and the rest, and the attention each gets.

Groups and masses are read apart, so that the groups of one run can be held while the masses of another are read: what
a mitigation did to the tokens that were sinks before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sinklens.inputs.spans import Kind
from sinklens.tracers import signals as sig
from sinklens.tracers.signals_pictures import QUERIES_RECEIVED
from sinklens.tracers.trace import PromptRecord, Trace

from .primary_sinks import PrimarySinks
from .visual import decided, no_rule, rule_of, with_pictures

GROUPS = ("text sink", "visual sink", "visual non-sink", "other")
KEYS = tuple(group.replace(" ", "_").replace("-", "") for group in GROUPS)
"""The same as keys of results."""
TEXT_SINK, VISUAL_SINK, VISUAL_REST, OTHER = range(len(GROUPS))
STATES, ATTENTION = "states", "attention"
AFTER_PICTURES, EVERY_TOKEN = "the text after the pictures", "all tokens"

Group = Int[np.ndarray, "layer pos"]
PerPosition = Float[np.ndarray, "layer pos"]


@dataclass(frozen=True)
class Grouped:
    """The groups of all prompts that take part.

    Attributes:
        members: By index of the prompt, the group of each token in each layer.
        rule: How sinks were told: `states` or `attention`.
        queries: Whose attention is counted, in words.
        visual: Whether prompts with pictures take part, and then they alone.
        left_out: Prompts of text beside such.
    """

    members: dict[int, Group]
    rule: str
    queries: str
    visual: bool
    left_out: int = 0

    @property
    def groups(self) -> tuple[int, ...]:
        """Those that the prompts can have."""
        return (TEXT_SINK, VISUAL_SINK, VISUAL_REST, OTHER) if self.visual else (TEXT_SINK, OTHER)


def grouped(trace: Trace, rule: str = "auto") -> Grouped | str:
    """The groups of a trace's tokens; a sentence where there can be none.

    Args:
        rule: `states` tells sinks by φ, in each layer by itself; `attention` takes the positions that the analyzer of
            primary sinks names, in the prompts in which some head gives them more than its epsilon; `auto` is
            `states` for prompts with pictures of a model that has sink dims, else `attention`.
    """
    pictured = with_pictures(trace)
    records = pictured or list(trace)
    lacking = no_rule(rule_of(trace)) if pictured else "φ is recorded of prompts with pictures only."
    if rule == STATES and lacking:
        return lacking
    if rule == STATES or (rule == "auto" and not lacking):
        sinks, how = _by_states(trace, records), STATES
    else:
        found = _by_attention(trace, records)
        if isinstance(found, str):
            return found
        sinks, how = found, ATTENTION
    queries = AFTER_PICTURES if pictured else EVERY_TOKEN
    members = {record.index: _members(record, sinks[record.index]) for record in records}
    return Grouped(members, how, queries, bool(pictured), len(trace) - len(records))


def _by_states(trace: Trace, records: list[PromptRecord]) -> dict[int, np.ndarray]:
    rule = rule_of(trace)
    assert rule is not None  # `no_rule` has said so
    return {record.index: decided(record, rule, rule).sinks for record in records}


def _by_attention(trace: Trace, records: list[PromptRecord]) -> dict[int, np.ndarray] | str:
    analyzer = PrimarySinks()
    finding = analyzer.analyze(trace)
    if finding.reason is not None:
        return finding.reason
    named = {int(row["position"]) for row in finding.rows}
    sinks = {}
    for record in records:
        strong = (record[sig.ATTENTION_RECEIVED] > analyzer.epsilon).any((0, 1))
        mine = named & {int(k) for k in record[sig.KEPT_POSITIONS][strong]}
        is_sink = np.isin(np.arange(len(record)), sorted(mine))
        sinks[record.index] = np.broadcast_to(is_sink, (len(trace.layers), len(record)))
    return sinks


def _members(record: PromptRecord, sinks: np.ndarray) -> Group:
    visual = np.zeros(len(record), dtype=bool) if record.spans is None else record.spans.visual[: len(record)]
    group = np.full(sinks.shape, OTHER, dtype=np.int8)
    group[:, visual] = VISUAL_REST
    group[sinks & ~visual] = TEXT_SINK
    group[sinks & visual] = VISUAL_SINK
    return group


def mass_by_position(record: PromptRecord) -> PerPosition | None:
    """What each key gets of a query's attention, mean over the counted queries and over heads; None without a query.

    Of a prompt with pictures the text queries after them count, of a text all. A row sums to 1 where no learned sink
    takes a share; a layer without attention is NaN.
    """
    if record.spans is not None and record.spans.visual.any():
        queries = int(record.spans.is_(Kind.QUESTION, Kind.GENERATED).sum())
        if QUERIES_RECEIVED.name not in record.arrays or not queries:
            return None
        return record[QUERIES_RECEIVED][:, 0].astype(np.float64) / queries
    visible = np.maximum(record[sig.VISIBLE_QUERIES], 0).astype(np.float64)
    return record[sig.ATTENTION_RECEIVED_MEAN].astype(np.float64) * visible / len(record)


def masses(trace: Trace, groups: Grouped) -> Float[np.ndarray, "prompt layer group"]:
    """Mass of every group in every layer, of each prompt that takes part."""
    found = []
    for record in trace:
        members, mass = groups.members.get(record.index), mass_by_position(record)
        if members is not None and mass is not None:
            found.append(
                np.stack([np.where(members == g, mass, 0.0).sum(-1) for g in range(len(GROUPS))], -1)
            )
    return np.array(found) if found else np.zeros((0, len(trace.layers), len(GROUPS)))


def learned(trace: Trace, groups: Grouped) -> Float[np.ndarray, "prompt layer"] | None:
    """Mass on learned sinks, which are no keys, of the same queries; None for a model without them."""
    name = sig.LEARNED_SINK_MASS.name
    taken = [r for r in trace if r.index in groups.members and mass_by_position(r) is not None]
    if not taken or any(name not in record.arrays for record in taken):
        return None
    if (
        groups.visual
    ):  # recorded of all queries only; what is missing from a row of these is the learned sink's
        return 1.0 - masses(trace, groups).sum(-1)
    return np.array([record[name].astype(np.float64).mean(1) for record in taken])
