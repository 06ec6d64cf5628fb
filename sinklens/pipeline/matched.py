"""Which interventions match what was found, and their controls: equal in count and in size, drawn with a seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from sinklens.analyzers.base import Finding, Status
from sinklens.analyzers.super_experts import ROUTED
from sinklens.inputs.spec import Prompt
from sinklens.models.spec import OpenedModel
from sinklens.tracers import signals as sig
from sinklens.tracers.blocked_key import KeyBlocked
from sinklens.tracers.interventions import (
    EntriesSet,
    Entry,
    ExpertsPruned,
    HeadsZeroed,
    Intervention,
    MedianEntriesZeroed,
    ProjectionZeroed,
    WriteZeroed,
)
from sinklens.tracers.trace import Trace

from .causes import (
    followed,
    is_found,
    largest_experts,
    sink_layers,
    sink_position,
    spike_places,
    spikes,
    taken_positions,
    watched_place,
    writers,
)
from .controls import DRAWS, Control, Draw, Instead, Pair, Spike

LARGEST, WRITERS, HEADS, KEYS = 6, 3, 3, 2
"""Experts by magnitude and by routing of the sink token per block, strongest heads, and further keys that are tried."""


@dataclass(frozen=True)
class Experiment:
    """One intervention with its controls.

    Attributes:
        kind: `massive`, `massive-mean`, `expert`, `key`, `heads` or `write`; decides how the effect is judged.
        what: What is done, in words that complete "With ...".
        target: What is changed, for tables.
        after_block: Where it is changed first; what remains is looked at behind it. None: nothing to look for.
    """

    name: str
    kind: str
    what: str
    intervention: Intervention
    controls: tuple[Control, ...] = ()
    target: dict[str, Any] = field(default_factory=dict)
    after_block: int | None = None


@dataclass(frozen=True)
class Matched:
    """The experiments of a run.

    Attributes:
        position: The position whose sink is measured, None if attention was not measured.
        sink_found: Whether that position is a sink by the run's rule; if not, there is none to lose.
        sink_layers: Blocks with a head that sinks on it, by the run's rule; empty if there is none.
        watched: The position and dims in which massive entries are looked for afterwards.
        skipped: What was found and could not be tried, with the reason.
        calibration: Prompts that the mean values come from, and whether the tried prompts are among them.
    """

    position: int | None
    watched: tuple[int, tuple[int, ...]] | None
    experiments: tuple[Experiment, ...]
    sink_found: bool = False
    sink_layers: tuple[int, ...] = ()
    skipped: tuple[str, ...] = ()
    calibration: dict[str, Any] = field(default_factory=dict)


def match(
    opened: OpenedModel,
    prompts: Sequence[Prompt],
    trace: Trace,
    findings: Mapping[str, Finding],
    *,
    seed: int,
) -> Matched:
    """The interventions that fit the findings of a run, for these (cut) prompts."""
    position = sink_position(findings)
    places = spike_places(trace, findings)
    draw = Draw(np.random.default_rng(seed), trace, prompts, taken_positions(findings, places))
    experiments: list[Experiment] = []
    calibration: dict[str, Any] = {}
    if places:
        found, calibration = _massive(
            opened, prompts, trace, places, draw, massive=is_found(findings, "massive-activations")
        )
        experiments += found
    experiments += _experts(trace, findings, places, position, draw)
    sink_found = position is not None and is_found(findings, "primary-sinks")
    if position is not None and sink_found:
        experiments += _keys(findings, position, draw)
        experiments += _heads(trace, findings, position, draw)
    watched = watched_place(places, position)
    if watched is not None:
        experiments += _writes(opened, places, watched[0], draw)
    layers = sink_layers(findings)
    skipped = tuple(draw.skipped)
    return Matched(position, watched, tuple(experiments), sink_found, layers, skipped, calibration)


def _massive(
    opened: OpenedModel,
    prompts: Sequence[Prompt],
    trace: Trace,
    places: Mapping[tuple[int, int], int],
    draw: Draw,
    *,
    massive: bool,
) -> tuple[list[Experiment], dict[str, Any]]:
    """Zero once, zero after every block from there on, and the signed mean of each entry over prompts."""
    lengths = {prompt.index: len(prompt) for prompt in prompts}
    everywhere = spikes(trace, places)
    mine = [spike for spike in everywhere if spike.position < lengths.get(spike.prompt, 0)]
    if not mine:
        draw.skipped.append("massive entries: none of the tried prompts has them")
        return [], {}
    means, prompts_behind, held_out = calibrated(everywhere, mine, lengths)
    last = len(opened.anatomy.main.blocks)
    said, block = _entries_said(places, massive), min(places.values())
    target = {
        "positions": sorted({p for p, _ in places}),
        "dims": sorted({d for _, d in places}),
        "layer": block,
    }
    chosen = draw.dims_instead(mine, set(target["dims"]))
    found = [_zeroed(mine, said, target, draw, chosen)]
    if any(s.layer < last - 1 for s in mine):
        found.append(_held_at_zero(followed(trace, mine, last), said, target, draw, chosen))
    whose = "other prompts" if held_out else "all prompts, the tried ones among them"
    found.append(_set_to_mean(mine, means, f"{said} set to the signed mean of {whose}", target, draw))
    kept = {_bucket(s) for s in mine}
    calibration = {
        "prompts": prompts_behind,
        "held_out": held_out,
        "means": [[*key, value] for key, value in sorted(means.items()) if key in kept],
    }
    return found, calibration


ORDINARY = "as many entries of median magnitude zeroed"
"""The control of entries set to zero that says whether it matters which entries they are."""


def _zeroed(
    mine: Sequence[Spike], said: str, target: dict[str, Any], draw: Draw, instead: Sequence[Instead]
) -> Experiment:
    """Massive entries set to zero once, where they begin."""
    zero = tuple(Entry(s.prompt, s.layer, s.position, s.dim) for s in mine)
    sized = [(s, abs(s.value)) for s in mine]
    controls = (*draw.shifted(sized, instead), Control(ORDINARY, (_median_zeroed(mine),)))
    return Experiment(
        "massive-zero", "massive", f"{said} set to zero", EntriesSet(zero), controls, target, target["layer"]
    )


def _held_at_zero(
    held: Sequence[Spike], said: str, target: dict[str, Any], draw: Draw, instead: Sequence[Instead]
) -> Experiment:
    """The same after every block from there on: what later blocks write there is taken away too."""
    zero = tuple(Entry(s.prompt, s.layer, s.position, s.dim) for s in held)
    ordinary = Control(f"{ORDINARY}, in every later block too", (_median_zeroed(held),))
    return Experiment(
        "massive-held",
        "massive",
        f"{said} held at zero in every later block too",
        EntriesSet(zero),
        (*draw.held(held, instead), ordinary),
        target,
        target["layer"],
    )


def _set_to_mean(
    mine: Sequence[Spike],
    means: Mapping[tuple[int, bool, int], float],
    what: str,
    target: dict[str, Any],
    draw: Draw,
) -> Experiment:
    """Massive entries set to their signed mean: what they do beyond being there in every prompt."""
    mean = tuple(Entry(s.prompt, s.layer, s.position, s.dim, means[_bucket(s)]) for s in mine)
    sized = [(s, abs(means[_bucket(s)] - s.value)) for s in mine]
    controls = draw.shifted(sized, draw.dims_instead(mine, set(target["dims"])))
    return Experiment(
        "massive-mean", "massive-mean", what, EntriesSet(mean), controls, target, target["layer"]
    )


def calibrated(
    everywhere: Sequence[Spike], mine: Sequence[Spike], tried: Mapping[int, int]
) -> tuple[dict[tuple[int, bool, int], float], int, bool]:
    """Signed means, how many prompts are behind them, and whether the tried prompts were kept out.

    They are kept out if every entry that is replaced has a mean without them.
    """
    others = [spike for spike in everywhere if spike.prompt not in tried]
    held_out = {_bucket(s) for s in mine} <= {_bucket(s) for s in others}
    source = others if held_out else everywhere
    return signed_means(source), len({s.prompt for s in source}), held_out


def _bucket(spike: Spike) -> tuple[int, bool, int]:
    """Means are taken per block, first token or other token, and dim."""
    return spike.layer, spike.position == 0, spike.dim


def signed_means(found: Iterable[Spike]) -> dict[tuple[int, bool, int], float]:
    """Signed mean value per bucket. Means of magnitudes would flip entries that are negative."""
    values: dict[tuple[int, bool, int], list[float]] = {}
    for spike in found:
        values.setdefault(_bucket(spike), []).append(spike.value)
    return {key: float(np.mean(found)) for key, found in values.items()}


def _median_zeroed(found: Sequence[Spike]) -> MedianEntriesZeroed:
    counts = Counter((spike.prompt, spike.layer) for spike in found)
    return MedianEntriesZeroed(tuple((prompt, layer, n) for (prompt, layer), n in sorted(counts.items())))


def _entries_said(places: Mapping[tuple[int, int], int], massive: bool) -> str:
    dims, positions = sorted({d for _, d in places}), sorted({p for p, _ in places})
    shown = ", ".join(map(str, dims[:4])) + (", ..." if len(dims) > 4 else "")
    at = ", ".join(map(str, positions[:4])) + (", ..." if len(positions) > 4 else "")
    blocks, kind = sorted(set(places.values())), "massive" if massive else "strongest"
    return (
        f"the {kind} entries (dim{'s' * (len(dims) > 1)} {shown} on position{'s' * (len(positions) > 1)} {at}, "
        f"after block {', '.join(map(str, blocks[:3]))})"
    )


def _experts(
    trace: Trace,
    findings: Mapping[str, Finding],
    places: Mapping[tuple[int, int], int],
    position: int | None,
    draw: Draw,
) -> list[Experiment]:
    """Super Experts one by one and together, the largest by magnitude, and those the sink token is routed to."""
    finding = findings.get("super-experts")
    if finding is None or finding.status is Status.NOT_APPLICABLE or sig.EXPERT_MAX not in trace.signals:
        return []
    named = [(row["layer"], row["expert"]) for row in finding.rows if row["kind"] == ROUTED]
    reach = max(sink_layers(findings), default=len(trace.layers))
    tried = list(
        dict.fromkeys(
            [*named, *largest_experts(trace, LARGEST, reach), *writers(trace, places, position, WRITERS)]
        )
    )
    out = []
    if len(named) > 1:
        group = frozenset(named)
        out.append(_pruned("super-experts", f"the {len(group)} Super Experts pruned", group, tried, draw))
    for pair in tried:
        name = f"L{pair[0]}E{pair[1]}"
        out.append(_pruned(f"expert-{name}", f"expert {name} pruned", frozenset([pair]), tried, draw))
    for row in finding.rows:
        if row["kind"] != ROUTED:
            out.append(_projection(trace, row, draw))
    return out


def _pruned(name: str, what: str, experts: frozenset[Pair], tried: Sequence[Pair], draw: Draw) -> Experiment:
    target = {"experts": sorted(map(list, experts))}
    control = draw.other_experts(experts, tried)
    return Experiment(
        name, "expert", what, ExpertsPruned(experts), control, target, min(at for at, _ in experts)
    )


def _projection(trace: Trace, row: dict[str, Any], draw: Draw) -> Experiment:
    layer, kind = int(row["layer"]), str(row["kind"])
    role = "shared_expert" if kind == "shared" else "down_proj"
    others = [info.index for info in trace.layers if getattr(info, role) and info.index != layer]
    chosen = draw.some(others, DRAWS)
    control = Control(
        f"the {kind} projection of another block zeroed", tuple(ProjectionZeroed(i) for i in chosen)
    )
    return Experiment(
        f"{kind}-L{layer}", "expert", f"the {kind} projection of block {layer} zeroed", ProjectionZeroed(layer),
        (control,) if chosen else (), {"layer": layer, "projection": kind}, layer,
    )  # fmt: skip


def _keys(findings: Mapping[str, Finding], position: int, draw: Draw) -> list[Experiment]:
    """The sink's key blocked, and those of further sinks and of secondary sinks."""
    rows = [row["position"] for row in findings["primary-sinks"].rows]
    secondary = findings.get("secondary-sinks")
    rows += [row["position"] for row in secondary.rows if "position" in row] if secondary is not None else []
    reach = max(len(prompt) for prompt in draw.prompts) - 1
    further = [p for p in dict.fromkeys(rows) if p != position and p < reach][:KEYS]
    out = []
    for key in (position, *further):
        ordinary = draw.other_positions()
        control = Control("the key of an ordinary position blocked", tuple(KeyBlocked(p) for p in ordinary))
        what = f"the key of position {key} blocked for all later queries"
        out.append(
            Experiment(
                f"key-{key}", "key", what, KeyBlocked(key), (control,) if ordinary else (), {"position": key}
            )
        )
    return out


def _heads(trace: Trace, findings: Mapping[str, Finding], position: int, draw: Draw) -> list[Experiment]:
    """The heads that give the sink most, together."""
    sinking = {(layer, head) for layer, head, *_ in findings["primary-sinks"].summary.get("heads", [])}
    alpha = [
        record[sig.ATTENTION_RECEIVED][:, :, int(np.flatnonzero(record[sig.KEPT_POSITIONS] == position)[0])]
        for record in trace
        if position in record[sig.KEPT_POSITIONS]
    ]
    if not sinking or not alpha:
        return []
    mean = np.nan_to_num(np.mean(alpha, axis=0))
    heads = sorted(sinking, key=lambda pair: (-mean[pair], pair))[:HEADS]
    named = ", ".join(f"L{layer}H{head}" for layer, head in heads)
    what = f"the output of the strongest sink head{'s' * (len(heads) > 1)} ({named}) zeroed"
    control = draw.other_heads(heads, sinking, mean.shape)
    return [
        Experiment(
            "heads",
            "heads",
            what,
            HeadsZeroed(frozenset(heads)),
            control,
            {"heads": sorted(map(list, heads))},
        )
    ]


def _writes(
    opened: OpenedModel, places: Mapping[tuple[int, int], int], position: int, draw: Draw
) -> list[Experiment]:
    """What the feed-forward part writes at the position in the block where its entries appear and beside it, and what
    the attention writes in that block."""
    layer = min(at for (where, _), at in places.items() if where == position)
    blocks = len(opened.anatomy.main.blocks)
    ordinary = draw.other_positions()
    out = []
    around: list[tuple[Literal["mlp", "attention"], int]] = [
        ("mlp", layer), ("mlp", layer - 1), ("mlp", layer + 1), ("attention", layer)
    ]  # fmt: skip
    for part, at in around:
        if not 0 <= at < blocks:
            continue
        said = "feed-forward part" if part == "mlp" else "attention"
        draws = tuple(WriteZeroed(at, part, p) for p in ordinary)
        control = Control(f"what the same {said} writes on an ordinary token zeroed", draws)
        out.append(
            Experiment(
                f"write-{part}-{at}", "write", f"what the {said} of block {at} writes on position {position} zeroed",
                WriteZeroed(at, part, position), (control,) if ordinary else (),
                {"layer": at, "part": part, "position": position}, at,
            )
        )  # fmt: skip
    return out
