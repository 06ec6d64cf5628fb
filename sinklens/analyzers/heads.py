"""What the analyzers of single heads share: the sinks of a trace, and means that know about missing values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
Histogram = Float[np.ndarray, "layer head bin"]
BINS = sig.FIRST_MASS_BINS


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


def usable(
    trace: Trace, signals: Iterable[Signal], min_tokens: int = 2, *, looks_back: bool = False
) -> tuple[list[PromptRecord], str | None]:
    """The prompts an attention metric can read, or none and a sentence that says why.

    Args:
        looks_back: The metric has no meaning where tokens attend to later ones; needs `VISIBLE_QUERIES`.
    """
    if not any(layer.attention for layer in trace.layers):
        return [], "the model has no softmax attention."
    records = [record for record in trace if len(record) >= min_tokens]
    if not records:
        longest = max((len(record) for record in trace), default=0)
        return [], f"it needs prompts of at least {min_tokens} tokens; the longest has {longest}."
    names = sorted(signal.name for signal in signals)
    missing = [name for name in names if any(name not in record.arrays for record in records)]
    if missing:
        hidden = "this model does not show it, or it was not asked for."
        return [], f"the trace does not hold {', '.join(missing)}; {hidden}"
    if looks_back and not all(_looks_back(record) for record in records):
        return (
            [],
            "it is defined for attention that only looks back, and here tokens attend to later ones too.",
        )
    return records, None


def _looks_back(record: PromptRecord) -> bool:
    """Under causal attention, with a window or without, the last key has one query: its own."""
    return bool(record[sig.VISIBLE_QUERIES][:, -1].max() <= 1)


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


def spread(record: PromptRecord, position: int) -> Histogram:
    """Queries by the mass they put on the position, of those that see it; NaN where it was not looked at.

    The recorded histogram holds all queries after the position. Those that do not see it (a sliding window) put 0
    on it; they are taken out of the lowest bin, so that a window cannot pass for a choice.
    """
    shape = (len(record[sig.VISIBLE_QUERIES]), n_heads(record), BINS)
    counts = np.full(shape, np.nan)
    if sig.REFERENCE_MASS.name not in record.arrays or sig.REFERENCE_POSITION.name not in record.arrays:
        return counts
    for layer, slot in np.argwhere(reference_slots(record, position)).tolist():
        found = record[sig.REFERENCE_MASS][layer, :, slot].astype(np.float64)
        seen = max(int(record[sig.VISIBLE_QUERIES][layer, position]) - 1, 0)
        if (found < 0).any():
            continue
        hidden = np.maximum(found.sum(-1) - seen, 0)
        found[:, 0] -= np.minimum(hidden, found[:, 0])
        counts[layer] = found
    return counts


def groups(spread: Histogram) -> tuple[PerHead, PerHead]:
    """Share of the queries with more than 0.9, and with less than 0.1, of their mass on the position."""
    total = spread.sum(-1)
    share = spread / np.where(total > 0, total, np.nan)[..., None]
    return share[..., -BINS // 10 :].sum(-1), share[..., : BINS // 10].sum(-1)


def bimodality(spread: Histogram) -> PerHead:
    """Sarle's coefficient `(skewness^2 + 1) / (excess kurtosis + 3 (n - 1)^2 / ((n - 2)(n - 3)))` of a histogram.

    With the bias corrections of skewness and kurtosis; NaN for fewer than 4 queries, 0 if all are in one bin.
    """
    centre = (np.arange(BINS) + 0.5) / BINS
    n = spread.sum(-1)
    n = np.where(n > 3, n, np.nan)
    middle = (spread * centre).sum(-1) / n
    gap = centre - middle[..., None]
    m2, m3, m4 = ((spread * gap**k).sum(-1) / n for k in (2, 3, 4))
    flat = m2 < 1e-9
    m2, m4 = np.where(flat, 1.0, m2), np.where(flat, 3.0, m4)
    skew = m3 / m2**1.5 * np.sqrt(n * (n - 1)) / (n - 2)
    excess = (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * (m4 / m2**2 - 3) + 6)
    value = (skew**2 + 1) / (excess + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3)))
    return np.where(flat & ~np.isnan(n), 0.0, value)


def named(pairs: Sequence[tuple[int, int]], most: int = 3) -> str:
    """`layer 2 head 5, layer 3 head 0 and 4 more`."""
    shown = [f"layer {layer} head {head}" for layer, head in pairs[:most]]
    rest = len(pairs) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")
