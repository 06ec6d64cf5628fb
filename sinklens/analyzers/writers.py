"""Who writes it: the block, sublayer, neuron or expert that writes a massive activation, and the one that erases it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sinklens.core.counts import counted
from sinklens.core.figures import Event, Figure, Life, Lines, Series, Timeline
from sinklens.core.papers import MASSIVE_ACTIVATIONS
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import Trace

from .base import Analyzer, Finding, Status, registry
from .massive_activations import MassiveActivations
from .spikes import COMMON, Group, Place, Spike, share_written, trace_spike
from .traced_entries import BLOCK, SIGNALS, Path, Step, largest_residue
from .writer_notes import reading_notes


@registry.register("writers")
@dataclass(frozen=True)
class Writers(Analyzer):
    """The block and the part of it that writes each massive activation into the residual stream, and what removes it.

    How it is computed: in every block, entry after = entry before + what attention adds + what the feed-forward part
    adds, exactly. For each (position, dim) that massive-activations names (or, if it names none, the entry that
    stands out most, if it reaches `spike_ratio` times the layer's median) each sublayer that adds at least `step` of
    the entry's peak is a step of writing, and each that takes as much away a step of erasing. Several steps are
    reported as such. Within a feed-forward part the routed expert with the largest contribution (routing weight
    included) and the input of its down projection with the largest contribution are named, if the part adds at least
    half of the entry's value at that block. Prompts are followed one by one; a row says in how many the step occurs
    and in how many it would have been seen. Sublayers are known for the 16 largest entries of a block's input and
    output; for the others among the 64 largest the block as a whole is known (`block`). Where prompts differ in
    sign, means are of the size, with the sign of most prompts, and a note says so.

    Compared with the paper: Sun et al. name the layer in which massive activations appear; the decomposition into
    sublayers, neurons and experts, the threshold `step` and the rule for erasing are ours. The super weights of the
    Super Experts paper are (block, dim, neuron) triples of the same kind. The official code of Sun et al.
    logs the three largest entries and the median of each layer and attributes nothing, so there is one recipe.

    When not to trust it: a block with more than 64 entries as large as this one does not list it; such prompts are
    counted (`n_unread`), and all means are over the others: with few of them read, what is said holds for those
    few. What adds most is not always what causes it: an earlier block can prepare a token so that a
    later one fires. Remove the writer to know (`causal-effects`). An entry that grows a little in every block has
    no writer by this rule; read `share_written`. Under a norm after the feed-forward part (Gemma) and for
    routed experts a neuron's own value is not in the units of the stream; `neuron_share` compares it with the down
    projection's output instead.

    Args:
        step: Least share of the peak that counts as a step.
        spike_ratio: Multiple of the layer's median an entry must reach to be followed.
        tolerance: Largest relative gap in the sum up to which sublayers are told apart.
        entries: Entries that are followed at most, strongest first.
    """

    step: float = 0.1
    spike_ratio: float = 50.0
    tolerance: float = 0.02
    entries: int = 24

    name = "writers"
    title = "Who writes it"
    place = 25
    formula = (
        '<math display="block"><msub><mi>h</mi><mi>l</mi></msub><mo>=</mo><msub><mi>h</mi><mrow><mi>l</mi><mo>-</mo>'
        "<mn>1</mn></mrow></msub><mo>+</mo><msub><mi>attention</mi><mi>l</mi></msub><mo>+</mo><msub><mi>mlp</mi><mi>l</mi>"
        "</msub><mo>,</mo><mspace width='2em'/><msub><mi>mlp</mi><mrow><mi>l</mi><mo>,</mo><mi>j</mi></mrow></msub>"
        "<mo>=</mo><munder><mo>∑</mo><mi>n</mi></munder><msub><mi>a</mi><mi>n</mi></msub><msub><mi>W</mi><mrow><mi>j</mi>"
        "<mo>,</mo><mi>n</mi></mrow></msub></math>"
    )
    needs = SIGNALS | MassiveActivations.needs | {sig.EXPERT_MAX}
    summarises = (
        "n_entries", "position", "token", "dim", "peak", "written_by", "erased_by", "first_layer",
        "main_layer", "main_sublayer", "main_neuron", "main_expert", "share_written",
        "erased_in_share_of_prompts", "agreement", "n_read", "n_unread", "same_sign", "largest_residue",
        "n_prompts",
    )  # fmt: skip
    reference = MASSIVE_ACTIVATIONS.at(
        "2, which layers (the block); the decomposition into sublayers, neurons and experts is ours"
    )

    def analyze(self, trace: Trace) -> Finding:
        if not trace.records:
            return self.not_applicable("there are no prompts.")
        if any(not {sig.RESIDUAL_AFTER.name, sig.RESIDUAL_BEFORE.name} <= r.arrays.keys() for r in trace):
            return self.not_applicable(
                "the trace does not follow entries through the blocks; profile again to record it."
            )
        places, below = standing_out(trace, self.spike_ratio)
        if not places:
            return self.not_applicable(
                f"there is no massive activation, nor any entry of {self.spike_ratio:g} times its layer's median."
            )
        spikes = [
            spike for place in places[: self.entries] if (spike := self._spike(trace, place)) is not None
        ]
        if not spikes:
            return self.not_applicable(
                "what the sublayers add could not be followed for this family of models: no block lists the entry."
            )
        spikes.sort(key=lambda spike: -abs(spike.peak))
        rows = [_row(spike, group) for spike in spikes for group in spike.groups]
        summary = _summary(trace, spikes)
        return self.finding(
            Status.FOUND if rows else Status.NOT_FOUND,
            _verdict(spikes),
            rows=rows,
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=_figures(spikes, len(trace.layers)),
            notes=self._notes(trace, spikes, len(places), below, summary),
        )

    def _spike(self, trace: Trace, place: Place) -> Spike | None:
        return trace_spike(trace, place, self.spike_ratio, self.step, self.tolerance)

    def _notes(
        self, trace: Trace, spikes: Sequence[Spike], places: int, below: bool, summary: dict[str, Any]
    ) -> list[str]:
        notes = []
        if below:
            notes.append(
                "No entry is massive by the published rule; the one that stands out most is followed instead."
            )
        if places > self.entries:
            notes.append(f"{places} entries are massive; the {self.entries} strongest were looked for.")
        tried = min(places, self.entries)
        if tried > len(spikes):
            notes.append(
                f"{tried - len(spikes)} of {tried} entries could not be followed: no block of any prompt lists them "
                "among its 16 largest."
            )
        notes += reading_notes(spikes)
        blocks = [
            (step, path)
            for spike in spikes
            for group in spike.groups
            for step, path in zip(group.steps, group.paths, strict=True)
            if group.part == BLOCK
        ]
        if any(path.listed[step.layer] for step, path in blocks):
            notes.append(
                "In some blocks the sum of what the sublayers add could not be verified; there the block alone is "
                "named."
            )
        if any(layer.residual != "block output" for layer in trace.layers):
            notes.append(
                "Post-LayerNorm model: the stream is read at the input of each block's last LayerNorm."
            )
        low = [spike for spike in spikes if share_written(spike) < 0.5]
        if low:
            notes.append(
                f"Of {len(low)} of {len(spikes)} entries less than half is written by the steps listed: they grow in "
                "many small steps, or in blocks that do not list them."
            )
        return notes


UNITS = {
    "value": "what the sublayer adds, signed, mean over the prompts in which the step occurs",
    "share": "share of the entry's peak (negative: taken away), mean over the same prompts",
    "peak": "largest value of the entry over the blocks, signed, mean over the prompts in which it was followed",
    "expert_share": "the expert's part of what the feed-forward part adds",
    "neuron_share": "the neuron's part of the down projection's output at the entry; above 1, others work against it",
    "agreement": "share of the prompts that show what this part of the block adds in which the step occurs",
    "n_prompts": "prompts in which the step occurs",
    "n_read": "prompts that show what this part of the block adds",
    "n_followed": "prompts in which the entry stands out and was followed",
    "n_unread": "prompts in which the entry may stand out but was not recorded",
    "same_sign": "share of the followed prompts whose peak has the sign that most have",
}

LABELS = {
    "role": "writes or erases",
    "n_entries": "entries followed",
    "share_written": "share of the strongest entry that its writing steps add up to",
    "largest_residue": "largest relative gap in before + attention + MLP = after",
    "written_by": "strongest entry written by",
    "erased_by": "strongest entry erased by",
    "agreement": "share of prompts that agree",
    "n_prompts": "prompts",
    "n_read": "prompts that could show it",
    "n_followed": "prompts followed",
    "n_unread": "prompts not read",
    "same_sign": "share with the same sign",
    "erased_in_share_of_prompts": "erased in this share of prompts",
    "main_layer": "main writer in layer",
    "main_sublayer": "main writer",
    "main_neuron": "its neuron",
    "main_expert": "its expert",
    "first_layer": "first written in layer",
}


def standing_out(trace: Trace, spike_ratio: float) -> tuple[list[Place], bool]:
    """The (position, dim) pairs of massive activations, strongest first, or else of the entry that stands out most.

    Returns:
        The places, and whether they come from below the published rule.
    """
    massive = MassiveActivations().analyze(trace)
    places = list(dict.fromkeys((row["position"], row["dim"]) for row in massive.rows))
    if places:
        return places, False
    if massive.summary.get("max_ratio", 0.0) >= spike_ratio:
        return [(massive.summary["max_position"], massive.summary["max_dim"])], True
    return [], True


def _row(spike: Spike, group: Group) -> dict[str, Any]:
    values = [spike.aligned(path) * step.value for step, path in zip(group.steps, group.paths, strict=True)]
    by_expert = [step.expert_value / step.value for step in group.steps if step.expert >= 0 and step.value]
    by_neuron = [
        step.neuron_value / output
        for step, path in zip(group.steps, group.paths, strict=True)
        if step.neuron >= 0 and (output := _projected(path, step)) is not None
    ]
    return {
        "position": spike.position,
        "token": spike.token,
        "dim": spike.dim,
        "role": "writes" if group.writes else "erases",
        "layer": group.layer,
        "sublayer": group.part,
        "expert": group.expert,
        "neuron": group.neuron,
        "share": group.share,
        "value": float(np.mean(values)),
        "peak": spike.peak,
        "expert_share": float(np.mean(by_expert)) if by_expert else None,
        "neuron_share": float(np.mean(by_neuron)) if by_neuron else None,
        "agreement": group.agreement,
        "n_prompts": len(group.steps),
        "n_read": group.n_read,
        "n_followed": len(spike.paths),
        "n_unread": spike.n_unread,
        "same_sign": spike.same_sign,
    }


def _projected(path: Path, step: Step) -> float | None:
    """The down projection's own output at the entry, before norms and routing weights, if the trace lists it."""
    arrays, layer = path.record.arrays, step.layer
    if step.expert >= 0:
        if sig.EXPERT_MAX.name not in arrays:
            return None
        place = (arrays["expert_max_pos"][layer, step.expert], arrays["expert_max_dim"][layer, step.expert])
        value = float(arrays["expert_max"][layer, step.expert]) if place == (path.position, path.dim) else 0.0
        return value or None
    if sig.DOWN_PROJ_TOP.name not in arrays:
        return None
    at = (arrays["down_proj_top_pos"][layer] == path.position) & (
        arrays["down_proj_top_dim"][layer] == path.dim
    )
    values = arrays["down_proj_top"][layer][at]
    return float(values[0]) if len(values) and values[0] else None


def _summary(trace: Trace, spikes: Sequence[Spike]) -> dict[str, Any]:
    top = spikes[0]
    writers, erasers = top.usual(writes=True), top.usual(writes=False)
    main = max(writers, key=lambda group: group.share, default=None)
    return {
        "n_entries": len(spikes),
        "position": top.position,
        "token": top.token,
        "dim": top.dim,
        "peak": top.peak,
        "written_by": [group.name for group in writers],
        "erased_by": [group.name for group in erasers],
        "first_layer": writers[0].layer if writers else None,
        "main_layer": main.layer if main else None,
        "main_sublayer": main.part if main else None,
        "main_neuron": main.neuron if main else None,
        "main_expert": main.expert if main else None,
        "share_written": share_written(top),
        "erased_in_share_of_prompts": top.erased,
        "agreement": main.agreement if main else None,
        "n_read": main.n_read if main else None,
        "n_unread": top.n_unread,
        "same_sign": top.same_sign,
        "largest_residue": largest_residue(trace),
        "n_prompts": len(top.paths),
    }


def _verdict(spikes: Sequence[Spike]) -> str:
    top = spikes[0]
    sign = "" if top.same_sign == 1 else "±"
    size = top.peak if top.same_sign == 1 else abs(top.peak)
    entry = f"dim {top.dim} on position {top.position} ({top.token!r}, peak {sign}{size:.4g})"
    more = ""
    if len(spikes) > 1:
        same = sum(_writers_of(spike) == _writers_of(top) for spike in spikes[1:])
        rest = len(spikes) - 1
        more = f" {rest} more {'entry' if rest == 1 else 'entries'}; {same} with the same writer."
    writers = top.usual(writes=True)
    if not writers:
        known = f" {counted(top.n_unread, 'more prompt')} could not be read." if top.n_unread else ""
        hidden = any(np.isnan(path.change[: path.peak_layer + 1]).any() for path in top.paths)
        how = "it grows in small steps" + (", or in blocks that do not list it" if hidden else "")
        return f"The strongest entry, {entry}, has no single writer: {how}.{known}{more}"
    said = [f"{group.name}, {100 * group.share:.0f} %" for group in writers[:4]]
    how = (
        f"is written by {said[0]}"
        if len(said) == 1
        else f"is written in {len(writers)} steps: {'; '.join(said)}"
    )
    return f"The strongest entry, {entry}, {how}; {_ending(top)}.{_seen_in(top, writers)}{more}"


def _seen_in(top: Spike, writers: Sequence[Group]) -> str:
    """A sentence on the prompts that do not show it; empty if all do."""
    every, read = len(top.paths) + top.n_unread, min(group.n_read for group in writers)
    return "" if read == every else f" That is known of {read} of {counted(every, 'prompt')}."


def _writers_of(spike: Spike) -> list[tuple[int, str]]:
    return [(group.layer, group.part) for group in spike.usual(writes=True)]


def _ending(spike: Spike) -> str:
    erasers = spike.usual(writes=False)
    if spike.erased < COMMON:
        return "it is never erased"
    if not erasers:
        return "it fades in small steps"
    return f"it is erased by {' and '.join(group.name for group in erasers[:3])}"


def _figures(spikes: Sequence[Spike], layers: int) -> list[Figure]:
    top = spikes[0]
    x = np.arange(layers)

    def mean(rows: list[np.ndarray]) -> np.ndarray:
        values = np.array([top.aligned(path) * row for path, row in zip(top.paths, rows, strict=True)])
        known = ~np.isnan(values)
        total = np.where(known, values, 0.0).sum(0)
        return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)

    marks = tuple((float(group.layer), group.name) for group in top.groups if group.part != BLOCK)[:4]
    return [
        Timeline(
            "lives",
            "Massive activations from writer to eraser",
            "Entries that were followed, strongest first; peak: largest value over the blocks, mean over the prompts "
            "in which it was followed.",
            tuple(_life(spike, abs(top.peak), layers) for spike in spikes),
            layers,
            "share of the strongest",
        ),
        Lines(
            "strongest",
            f"Dim {top.dim} of position {top.position} through the blocks",
            "Value after each block and what its two sublayers add, mean over those of "
            f"{counted(len(top.paths), 'prompt')} in "
            f"which it is known{_not_read(top)}. A gap: the entry is not among the strongest there.",
            (
                Series("after the block", x, mean([path.after for path in top.paths]), emphasis=True),
                Series("added by attention", x, mean([path.attention for path in top.paths])),
                Series("added by the MLP", x, mean([path.mlp for path in top.paths])),
            ),
            "layer",
            "value",
            marks=marks,
        ),
    ]


def _not_read(spike: Spike) -> str:
    return f"; {spike.n_unread} more could not be read" if spike.n_unread else ""


def _life(spike: Spike, strongest: float, layers: int) -> Life:
    writers, erasers = spike.usual(writes=True), spike.usual(writes=False)
    start = writers[0].layer if writers else spike.paths[0].peak_layer
    end = erasers[-1].layer - 1 if erasers and spike.erased >= COMMON else layers - 1
    events = [Event(g.layer, g.name, "rise") for g in writers] + [
        Event(g.layer, g.name, "fall") for g in erasers
    ]
    return Life(
        f"position {spike.position} {spike.token!r}, dim {spike.dim}",
        start,
        max(start, end),
        min(1.0, abs(spike.peak) / strongest),
        tuple(events),
        note=f"peak {spike.peak:.4g}",
    )
