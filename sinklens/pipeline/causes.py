"""What the findings of a run name as causes: the sink, massive entries, experts, positions that are not ordinary."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sinklens.analyzers.base import Finding, Status
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import Trace

from .controls import Pair, Spike

SPIKE = 50.0
"""Multiple of the layer's median from which the strongest entry is tried where none is massive by the rule."""


def sink_position(findings: Mapping[str, Finding]) -> int | None:
    """The position that primary-sinks names strongest (sink or not), None if it was not measured."""
    finding = findings.get("primary-sinks")
    return None if finding is None else finding.summary.get("strongest_position")


def sink_layers(findings: Mapping[str, Finding]) -> tuple[int, ...]:
    """Blocks with a head that sinks on the strongest position."""
    finding = findings.get("primary-sinks")
    heads = [] if finding is None else finding.summary.get("heads", [])
    return tuple(sorted({int(layer) for layer, *_ in heads}))


def spike_places(trace: Trace, findings: Mapping[str, Finding]) -> dict[tuple[int, int], int]:
    """`(position, dim)` of the massive activations and the block where each first appears.

    Where none is massive by the rule, the strongest entries of the position that stands out most, if they reach 50
    times their layer's median: narrow models have spikes that carry a sink and cannot reach a thousandfold.
    """
    finding = findings.get("massive-activations")
    if finding is None or finding.status is Status.NOT_APPLICABLE:
        return {}
    if finding.rows:
        return {(row["position"], row["dim"]): row["written_at"] for row in finding.rows}
    summary = finding.summary
    if summary.get("max_ratio", 0.0) < SPIKE or summary.get("max_written_at") is None:
        return {}
    layer, position = summary["max_written_at"], summary["max_position"]
    counts: Counter[int] = Counter()
    for record in trace:
        value = np.abs(record[sig.RESIDUAL_TOP][layer])
        strong = (record["residual_top_pos"][layer] == position) & (
            value >= SPIKE * record[sig.RESIDUAL_MEDIAN][layer]
        )
        counts.update(record["residual_top_dim"][layer][strong].tolist())
    dims = {int(dim) for dim, n in counts.items() if 2 * n >= len(trace)} | {summary["max_dim"]}
    return {(position, dim): layer for dim in sorted(dims)}


def watched_place(
    places: Mapping[tuple[int, int], int], position: int | None
) -> tuple[int, tuple[int, ...]] | None:
    """The sink position if massive entries sit there, else the position that has most of them."""
    if not places:
        return None
    counts = Counter(at for at, _ in places)
    at = position if position is not None and position in counts else counts.most_common(1)[0][0]
    return at, tuple(sorted(dim for where, dim in places if where == at))


def spikes(
    trace: Trace, places: Mapping[tuple[int, int], int], layers: Mapping[int, int] | None = None
) -> list[Spike]:
    """The entries at these places, in each prompt that has them among its strongest."""
    out = []
    for record in trace:
        for (position, dim), layer in places.items():
            at = (record["residual_top_pos"][layer] == position) & (record["residual_top_dim"][layer] == dim)
            value = record[sig.RESIDUAL_TOP][layer][at]
            if len(value) and np.isfinite(value[0]):
                out.append(Spike(record.index, layer, position, dim, float(value[0])))
    return out


def followed(trace: Trace, first: Sequence[Spike], blocks: int) -> list[Spike]:
    """Each entry in the block where it first appears and in every later one, with the value it has there.

    An entry that is no longer among a block's strongest counts as the smallest of those, or as what it was before if
    that is less: it is not larger.
    """
    records = {record.index: record for record in trace}
    out = []
    for spike in first:
        record, value = records[spike.prompt], spike.value
        for layer in range(spike.layer, blocks):
            top = record[sig.RESIDUAL_TOP][layer]
            at = (record["residual_top_pos"][layer] == spike.position) & (
                record["residual_top_dim"][layer] == spike.dim
            )
            found, listed = top[at], np.abs(top[np.isfinite(top)])
            if len(found) and np.isfinite(found[0]):
                value = float(found[0])
            elif len(listed):
                value = float(np.sign(value)) * min(abs(value), float(listed.min()))
            out.append(replace(spike, layer=layer, value=value))
    return out


def largest_experts(trace: Trace, n: int, before: int) -> list[Pair]:
    """Routed experts by the largest |output| over prompts, in blocks before `before`.

    What a later block writes, no attention up to there can see.
    """
    size = np.max(np.abs([np.nan_to_num(record[sig.EXPERT_MAX][:before]) for record in trace]), axis=0)
    order = np.argsort(-size, axis=None, kind="stable")[:n]
    pairs = [divmod(int(i), size.shape[1]) for i in order]
    return [pair for pair in pairs if size[pair] > 0]


def writers(trace: Trace, places: Mapping[tuple[int, int], int], position: int | None, n: int) -> list[Pair]:
    """Experts that may write the entries: those traced as their writers, and those that get the sink token, with the
    largest mean routing weight, in the blocks where entries appear."""
    traced = traced_writers(trace, places)[:n]
    if position is None or sig.ROUTER_CHOICE not in trace.signals:
        return traced
    routed: list[Pair] = []
    for layer in sorted({layer for (at, _), layer in places.items() if at == position}):
        weight: dict[int, float] = defaultdict(float)
        for record in trace:
            at = np.flatnonzero(record[sig.KEPT_POSITIONS] == position)
            if len(at):
                chosen = record[sig.ROUTER_CHOICE][layer, at[0]]
                for expert, share in zip(chosen, record[sig.ROUTER_WEIGHT][layer, at[0]], strict=True):
                    if expert >= 0:
                        weight[int(expert)] += float(np.nan_to_num(share))
        routed += [(layer, expert) for expert in sorted(weight, key=lambda e: (-weight[e], e))[:n]]
    return list(dict.fromkeys([*traced, *routed]))


def traced_writers(trace: Trace, places: Mapping[tuple[int, int], int]) -> list[Pair]:
    """Experts by the largest part they write in these entries, in any block; [] where writes were not traced."""
    if sig.WRITE_EXPERT not in trace.signals or sig.WRITE_EXPERT_VALUE not in trace.signals:
        return []
    largest: dict[Pair, float] = defaultdict(float)
    for record in trace:
        for position, dim in places:
            here = (record["residual_after_pos"] == position) & (record["residual_after_dim"] == dim)
            for layer, entry in np.argwhere(here & (record[sig.WRITE_EXPERT] >= 0)):
                pair = (int(layer), int(record[sig.WRITE_EXPERT][layer, entry]))
                value = abs(float(np.nan_to_num(record[sig.WRITE_EXPERT_VALUE][layer, entry])))
                largest[pair] = max(largest[pair], value)
    return sorted(largest, key=lambda pair: (-largest[pair], pair))


def is_found(findings: Mapping[str, Finding], name: str) -> bool:
    return name in findings and findings[name].status is Status.FOUND


def taken_positions(findings: Mapping[str, Finding], places: Mapping[tuple[int, int], int]) -> set[int]:
    """Positions that are not ordinary."""
    out = {position for position, _ in places} | {0}
    primary = findings.get("primary-sinks")
    if primary is not None and "strongest_position" in primary.summary:
        out |= {primary.summary["strongest_position"], *primary.summary.get("norm_sink_positions", [])}
    for name in ("primary-sinks", "secondary-sinks"):
        if name in findings:
            out |= {row["position"] for row in findings[name].rows if "position" in row}
    return out
