"""Signals of the attention seam: which statistics they need, and their reduction to per-prompt arrays."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sinklens.kernels.spec import AttentionCall, AttentionStatistics, Stat, Want

from . import signals as sig
from .attention import Site
from .ledger import USERS_OF_REFERENCES, Arrays, Ledger, Limits
from .prompt_view import PromptView
from .record_pictures import PicturesRecorder
from .record_reading import ReadingRecorder
from .record_vectors import VectorsRecorder
from .record_visual import TextQueriesRecorder
from .references import Leaders, seen_by_enough
from .signals import Signal

_HERE = frozenset(signal for signal in sig.ALL_SIGNALS if signal.source is sig.Source.ATTENTION)
# What is kept per head is kept for the positions that receive most.
KEPT = frozenset(signal for signal in _HERE if "kept" in signal.axes)

STATS_OF: dict[Signal, frozenset[Stat]] = {
    # What is read from queries, keys and values alone needs some statistic too, or the call is not shown at all.
    **{signal: frozenset({Stat.RECEIVED}) for signal in _HERE | USERS_OF_REFERENCES},
    sig.ATTENTION_SELF: frozenset({Stat.RECEIVED, Stat.DIAGONAL}),
    sig.ATTENTION_TOP1: frozenset({Stat.RECEIVED, Stat.TOP1}),
    sig.ATTENTION_ENTROPY: frozenset({Stat.ENTROPY}),
    sig.ATTENTION_DISTANCE: frozenset({Stat.DISTANCE}),
    sig.ATTENTION_ROW_MAX: frozenset({Stat.ROW_MAX}),
    sig.FIRST_MASS: frozenset({Stat.GROUP_MASS}),
    sig.LEARNED_SINK_MASS: frozenset({Stat.LEARNED_SINK}),
    sig.REFERENCE_MASS: frozenset({Stat.RECEIVED, Stat.GROUP_MASS}),
    sig.COLUMN_ENTROPY: frozenset({Stat.RECEIVED, Stat.RECEIVED_LOG}),
    sig.COLUMN_ENTROPY_PEAK: frozenset({Stat.RECEIVED, Stat.RECEIVED_LOG}),
    sig.ATTENTION_TAIL: frozenset({Stat.RECEIVED, Stat.RECEIVED_TAIL}),
    sig.TAIL_ENTROPY: frozenset({Stat.RECEIVED_TAIL}),
    sig.TAIL_PEAK: frozenset({Stat.RECEIVED_TAIL}),
    sig.ATTENTION_ENTROPY_NORMALISED: frozenset({Stat.ENTROPY_NORMALISED}),
    sig.LOCAL_DISTANCE: frozenset({Stat.DISTANCE, Stat.DISTANCE_WINDOWED, Stat.GROUP_MASS}),
    sig.FUTURE_INFLUENCE: frozenset(
        {Stat.DISTANCE, Stat.RECEIVED_BAND, Stat.RECEIVED_BAND_REST, Stat.GROUP_MASS}
    ),
    sig.PROBE_RECEIVED: frozenset({Stat.RECEIVED_ROWS}),
    sig.PROBE_VISIBLE: frozenset({Stat.RECEIVED_ROWS}),
}
_PER_ROW = {
    sig.ATTENTION_ENTROPY: Stat.ENTROPY,
    sig.ATTENTION_ENTROPY_NORMALISED: Stat.ENTROPY_NORMALISED,
    sig.ATTENTION_DISTANCE: Stat.DISTANCE,
    sig.ATTENTION_ROW_MAX: Stat.ROW_MAX,
    sig.LEARNED_SINK_MASS: Stat.LEARNED_SINK,
}
# Without these nothing can be kept per head.
_ALWAYS = frozenset({sig.VISIBLE_QUERIES, sig.ATTENTION_RECEIVED})
_COLUMNS = frozenset({sig.COLUMN_ENTROPY, sig.COLUMN_ENTROPY_PEAK})
_TAILS = frozenset({sig.ATTENTION_TAIL, sig.TAIL_ENTROPY, sig.TAIL_PEAK})


class AttentionRecorder:
    """Collects what one batch shows at the attention seam."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.leaders = Leaders(ledger)
        self.vectors = VectorsRecorder(ledger)
        self.reading = ReadingRecorder(ledger)
        self.text_queries: TextQueriesRecorder | None = None
        self.pictures: PicturesRecorder | None = None
        self.sampled: dict[int, np.ndarray] = {}
        """By prompt, the query rows that were looked at; those that are not here were looked at in full."""
        self._stats = frozenset(stat for signal in ledger.wanted for stat in STATS_OF.get(signal, ()))

    def asks(self, site: Site, call: AttentionCall) -> Want:
        """The statistics the wanted signals need. Key groups are the first token, and the leader if it is asked for.

        Here, before the attention runs, the block's reference positions are settled.
        """
        self.leaders.choose()
        stats = self._stats if call.off_keys else self._stats - {Stat.LEARNED_SINK}
        groups = self._groups(call) if stats & {Stat.GROUP_MASS, Stat.RECEIVED_BAND_REST} else None
        probes = self.reading.probes(call) if Stat.RECEIVED_ROWS in stats else None
        return Want(stats, groups=groups, probes=probes)

    def _groups(self, call: AttentionCall) -> Tensor:
        count = sig.REFERENCES if sig.REFERENCE_MASS in self.ledger.wanted else 1
        batch, keys = call.key.shape[0], call.key.shape[2]
        groups = torch.zeros(count, batch, keys, dtype=torch.bool, device=call.key.device)
        for row, places in enumerate(self.ledger.places(keys, call.key.device)):
            for slot, position in enumerate(self.ledger.references[row][:count]):
                if 0 <= position < len(places):
                    groups[slot, row, places[position]] = True
        return groups

    def on_attention(self, site: Site, call: AttentionCall, statistics: AttentionStatistics) -> None:
        """Reduce one layer's statistics to per-prompt arrays on the CPU."""
        self.vectors.begin(site, call)
        spans = self.ledger.spans(call.key.shape[2], call.key.device)
        lengths = [len(places) for places in self.ledger.places(call.key.shape[2], call.key.device)]
        for row, (span, length) in enumerate(zip(spans, lengths, strict=True)):
            view = PromptView(row, site.layer, call, statistics, span, length)
            if view.sample is not None and row not in self.sampled:
                places = self.ledger.places(call.key.shape[2], call.key.device)[row].cpu().numpy()
                self.sampled[row] = np.searchsorted(places, view.sample.rows).astype(np.int32)
            self._keys(view)
            self._rows(view)
            self._references(view)
            self.vectors.on_prompt(view)
            self.reading.on_prompt(view)
            if self.text_queries is not None:
                self.text_queries.on_prompt(view)
            if self.pictures is not None:
                self.pictures.on_prompt(view)

    def on_projection(self, layer: int, heads: int, module: nn.Module, x: Tensor) -> None:
        """The attention output projection of a block is about to run on `x`."""
        self.vectors.on_projection(layer, heads, module, x)
        if self.text_queries is not None:
            self.text_queries.on_projection(layer, heads, module)

    def _put(self, view: PromptView, signal: Signal, value: Tensor, suffix: str = "") -> None:
        if signal in self.ledger.wanted or signal in _ALWAYS:
            self.ledger.put(view.row, signal.name + suffix, view.layer, value)

    def _error(self, view: PromptView, signal: Signal, stat: Stat) -> None:
        """The standard error of a mean over the queries that see a key, where they were sampled."""
        if view.statistics.samples is not None:
            self._put(view, signal, view.error(stat) / view.visible.clamp(min=1), sig.ERROR)

    def _keys(self, view: PromptView) -> None:
        """What keys receive."""
        wanted, visible = self.ledger.wanted, view.visible
        self._put(view, sig.VISIBLE_QUERIES, visible.amax(0).to(torch.int32))
        if view.has(Stat.RECEIVED):
            self._put(view, sig.ATTENTION_RECEIVED, view.share)
            self._error(view, sig.ATTENTION_RECEIVED, Stat.RECEIVED)
            if wanted & USERS_OF_REFERENCES:
                self.leaders.add(view)
        if view.has(Stat.TOP1):
            self._put(view, sig.ATTENTION_TOP1, view.of(Stat.TOP1) / visible.clamp(min=1))
            self._error(view, sig.ATTENTION_TOP1, Stat.TOP1)
        if view.has(Stat.DIAGONAL):
            self._put(view, sig.ATTENTION_SELF, view.of(Stat.DIAGONAL))
        if wanted & _COLUMNS:
            entropy = column_entropy(view.of(Stat.RECEIVED), view.of(Stat.RECEIVED_LOG), visible)
            self._put(view, sig.COLUMN_ENTROPY, entropy)
            enough = seen_by_enough(visible.amax(0), self.ledger.limits.min_visible)
            peak, place = entropy.nan_to_num(-1.0).masked_fill(~enough, -1.0).max(-1)
            self._put(view, sig.COLUMN_ENTROPY_PEAK, torch.where(peak >= 0, peak, float("nan")))
            self._put(view, sig.COLUMN_ENTROPY_PEAK, torch.where(peak >= 0, place, -1).int(), "_pos")
        if wanted & _TAILS:
            tail = view.of(Stat.RECEIVED_TAIL) / min(Want.tail, view.length)
            self._put(view, sig.ATTENTION_TAIL, tail)
            self._put(view, sig.TAIL_ENTROPY, -torch.xlogy(tail, tail).sum(-1))
            peak, place = tail.max(-1)
            self._put(view, sig.TAIL_PEAK, peak)
            self._put(view, sig.TAIL_PEAK, place.int(), "_pos")

    def _rows(self, view: PromptView) -> None:
        """Means over the queries."""
        for signal, stat in _PER_ROW.items():
            if view.has(stat):
                mean, error = view.over_rows(stat)
                self._put(view, signal, mean)
                if error is not None:
                    self._put(view, signal, error, sig.ERROR)

    def _references(self, view: PromptView) -> None:
        """Which positions the block's references are, and what the queries after them give."""
        wanted, places = self.ledger.wanted, self.ledger.references[view.row]
        self._put(view, sig.REFERENCE_POSITION, torch.tensor(places, dtype=torch.int32))
        if not view.has(Stat.GROUP_MASS):
            return
        mass = view.of(Stat.GROUP_MASS)
        if sig.FIRST_MASS in wanted:
            self._put(view, sig.FIRST_MASS, mass_histogram(mass[:, 1:, 0]))
        if sig.REFERENCE_MASS in wanted:
            counts = [mass_histogram(mass[:, place + 1 :, slot]) for slot, place in enumerate(places)]
            for slot, place in enumerate(places):
                if place < 0:
                    counts[slot].fill_(-1)
            self._put(view, sig.REFERENCE_MASS, torch.stack(counts, 1))


def keep_positions(arrays: Arrays, limits: Limits) -> None:
    """Mean and peak over heads for every position; per head, the leading and the strongest positions only."""
    received = arrays[sig.ATTENTION_RECEIVED.name]
    # A layer without attention is all NaN and has no say.
    peak = np.nanmax(received, axis=(0, 1))
    arrays[sig.ATTENTION_RECEIVED_MEAN.name] = received.mean(1)
    arrays[sig.ATTENTION_RECEIVED_PEAK.name] = peak
    visible = arrays[sig.VISIBLE_QUERIES.name].max(0)
    enough = visible >= min(limits.min_visible, visible.max())
    ranking = np.argsort(np.where(enough, -peak, np.inf), kind="stable")
    kept = np.union1d(np.arange(min(limits.leading, len(peak))), ranking[: limits.strongest])
    arrays[sig.KEPT_POSITIONS.name] = kept.astype(np.int32)
    error = arrays.get(sig.ATTENTION_RECEIVED.name + sig.ERROR)
    if error is not None:
        # All heads read the same rows, so their errors may go together: a bound.
        arrays[sig.ATTENTION_RECEIVED_MEAN.name + sig.ERROR] = error.mean(1)
    for signal in KEPT:
        for name in (signal.name, signal.name + sig.ERROR):
            if name in arrays and len(signal.axes) == 3:
                arrays[name] = np.ascontiguousarray(arrays[name][:, :, kept])


def column_entropy(
    received: Float[Tensor, "head pos"],
    received_log: Float[Tensor, "head pos"],
    visible: Int[Tensor, "visible_head pos"],
) -> Float[Tensor, "head pos"]:
    """Entropy of each column normalised to sum 1, over its largest possible; 0 for one query, NaN without weight.

    With S the sum of a column and L that of A log A, the entropy of A / S is log S - L / S.
    """
    entropy = received.log() - received_log / received
    ratio = entropy.clamp(min=0.0) / visible.clamp(min=2).log()
    ratio = torch.where(visible > 1, ratio.clamp(max=1.0), 0.0)
    return torch.where(received > 0, ratio, float("nan"))


def mass_histogram(mass: Float[Tensor, "head query"]) -> Int[Tensor, "head bin"]:
    """Counts of masses in [0, 1]."""
    bins = (mass * sig.FIRST_MASS_BINS).long().clamp(0, sig.FIRST_MASS_BINS - 1)
    counts = torch.zeros(len(mass), sig.FIRST_MASS_BINS, dtype=torch.int32, device=mass.device)
    return counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.int32))
