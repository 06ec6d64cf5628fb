"""What the analyzers of single heads share: the sinks of a trace, and means that know about missing values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from sinklens.tracers import signals as sig
from sinklens.tracers.signals import Signal
from sinklens.tracers.trace import PromptRecord, Trace

from .base import Status
from .evidence import column, gather
from .primary_sinks import PrimarySinks

PerHead = Float[np.ndarray, "layer head"]


@dataclass(frozen=True)
class Sink:
    """One sink position of a trace and the heads that sink on it consistently.

    Attributes:
        records: The prompts in which enough queries see the position.
    """

    position: int
    token: str
    heads: Bool[np.ndarray, "layer head"]
    records: tuple[PromptRecord, ...]


def find_sinks(trace: Trace, rule: PrimarySinks | None = None) -> tuple[list[Sink], str | None]:
    """The sinks `primary-sinks` finds, strongest first; where it does not apply, none and its reason."""
    rule = rule or PrimarySinks()
    finding = rule.analyze(trace)
    if finding.status is Status.NOT_APPLICABLE:
        return [], finding.reason
    evidence = [
        gather(record, min_visible=rule.min_visible, exclude_diagonal=rule.exclude_diagonal)
        for record in trace
        if len(record) >= rule.min_tokens
    ]
    sinks = []
    for row in finding.rows:
        found = column(evidence, row["position"], rule.min_visible)
        mask = np.zeros(found.alpha.shape[1:], dtype=bool)
        for layer, head, _ in found.heads(rule.epsilon, rule.min_lift, rule.min_prompts):
            mask[layer, head] = True
        holders = tuple(e.record for e in evidence if e.is_seen(row["position"], rule.min_visible))
        sinks.append(Sink(row["position"], row["token"], mask, holders))
    return sinks, None


def mean(values: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over a list of equal arrays that leaves NaN out; NaN where nothing is known."""
    stack = np.stack([np.asarray(value, dtype=np.float64) for value in values])
    known = ~np.isnan(stack)
    n = known.sum(0)
    return np.where(n > 0, np.where(known, stack, 0.0).sum(0) / np.maximum(n, 1), np.nan)


def middle(values: np.ndarray) -> float | None:
    """Median of what is known, None if nothing is."""
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else None


def average(values: np.ndarray) -> float | None:
    """Mean of what is known, None if nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def number(value: Any) -> float | None:
    """A scalar as a plain number, None if it is NaN."""
    return None if np.isnan(value) else float(value)


def n_heads(record: PromptRecord) -> int:
    return record[sig.ATTENTION_RECEIVED].shape[1]


def at_position(record: PromptRecord, signal: Signal, position: int) -> np.ndarray | None:
    """A `(layer, head or kv_head, kept)` signal at one position; None if the trace lacks it there."""
    at = np.flatnonzero(record[sig.KEPT_POSITIONS] == position)
    if signal.name not in record.arrays or not len(at):
        return None
    return record[signal][:, :, at[0]].astype(np.float64)


def by_head(values: Float[np.ndarray, "layer kv_head"], heads: int) -> PerHead:
    """One value per query head: head h reads key-value head h // (heads / kv_heads)."""
    return np.repeat(values, heads // values.shape[1], axis=1)


def norm_ratio(record: PromptRecord, norm: Signal, mean_norm: Signal, position: int) -> PerHead | None:
    """A position's norm over the mean norm of all *other* positions, per query head; None if not recorded."""
    here = at_position(record, norm, position)
    if here is None or mean_norm.name not in record.arrays or len(record) < 2:
        return None
    total = record[mean_norm].astype(np.float64) * len(record)
    others = (total - here) / (len(record) - 1)
    ratio = np.where(others > 0, here / np.where(others > 0, others, 1.0), np.nan)
    return by_head(ratio, n_heads(record))


def reference_slots(record: PromptRecord, position: int) -> Bool[np.ndarray, "layer reference"]:
    """In which layers, and in which slot, the position was one of the two looked at closely."""
    return record[sig.REFERENCE_POSITION] == position


def mass_after(record: PromptRecord, position: int) -> PerHead | None:
    """Mean attention a position receives from the later (or other) queries that see it, its own row left out."""
    received = at_position(record, sig.ATTENTION_RECEIVED, position)
    own = at_position(record, sig.ATTENTION_SELF, position)
    if received is None or own is None:
        return None
    seen = record[sig.VISIBLE_QUERIES][:, position, None].astype(np.float64)
    return np.where(seen > 1, (received * seen - own) / np.maximum(seen - 1, 1), np.nan)


def named(pairs: Sequence[tuple[int, int]], most: int = 3) -> str:
    """`layer 2 head 5, layer 3 head 0 and 4 more`."""
    shown = [f"layer {layer} head {head}" for layer, head in pairs[:most]]
    rest = len(pairs) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")
