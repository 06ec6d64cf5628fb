"""Signals of the attention seam: which statistics they need, and their reduction to per-prompt arrays."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sinklens.kernels.spec import AttentionCall, AttentionStatistics, Stat, Want

from . import signals as sig
from .attention import Site
from .ledger import Arrays, Ledger, Limits
from .signals import Signal

STATS_OF: dict[Signal, Stat] = {
    sig.ATTENTION_RECEIVED: Stat.RECEIVED,
    sig.ATTENTION_RECEIVED_MEAN: Stat.RECEIVED,
    sig.ATTENTION_RECEIVED_PEAK: Stat.RECEIVED,
    sig.KEPT_POSITIONS: Stat.RECEIVED,
    sig.VISIBLE_QUERIES: Stat.RECEIVED,
    sig.ATTENTION_SELF: Stat.DIAGONAL,
    sig.ATTENTION_TOP1: Stat.TOP1,
    sig.ATTENTION_ENTROPY: Stat.ENTROPY,
    sig.ATTENTION_DISTANCE: Stat.DISTANCE,
    sig.ATTENTION_ROW_MAX: Stat.ROW_MAX,
    sig.FIRST_MASS: Stat.GROUP_MASS,
    sig.LEARNED_SINK_MASS: Stat.LEARNED_SINK,
}
_PER_KEY = {sig.ATTENTION_RECEIVED: Stat.RECEIVED, sig.ATTENTION_TOP1: Stat.TOP1}
_PER_ROW = {
    sig.ATTENTION_ENTROPY: Stat.ENTROPY,
    sig.ATTENTION_DISTANCE: Stat.DISTANCE,
    sig.ATTENTION_ROW_MAX: Stat.ROW_MAX,
}


class AttentionRecorder:
    """Collects what one batch shows at the attention seam."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def asks(self, site: Site, call: AttentionCall) -> Want:
        """The statistics the wanted signals need; the one key group is the first real token."""
        stats = {STATS_OF[signal] for signal in self.ledger.wanted if signal in STATS_OF}
        if call.learned_sinks is None:
            stats.discard(Stat.LEARNED_SINK)
        if Stat.GROUP_MASS not in stats:
            return Want(frozenset(stats))
        first = torch.zeros(1, call.key.shape[0], call.key.shape[2], dtype=torch.bool, device=call.key.device)
        for row, places in enumerate(self.ledger.places(call.key.shape[2], call.key.device)):
            first[0, row, places[:1]] = True
        return Want(frozenset(stats), groups=first)

    def on_attention(self, site: Site, call: AttentionCall, statistics: AttentionStatistics) -> None:
        """Reduce one layer's statistics to per-prompt arrays on the CPU."""
        assert statistics.visible is not None
        for row, places in enumerate(self.ledger.places(call.key.shape[2], call.key.device)):
            visible = statistics.visible[row, :, places]
            self.ledger.put(row, sig.VISIBLE_QUERIES.name, site.layer, visible.amax(0).to(torch.int32))
            for signal, stat in _PER_KEY.items():
                if stat in statistics.values:
                    share = statistics[stat][row][:, places] / visible.clamp(min=1)
                    self.ledger.put(row, signal.name, site.layer, share)
            for signal, stat in _PER_ROW.items():
                if signal in self.ledger.wanted:
                    self.ledger.put(row, signal.name, site.layer, statistics[stat][row][:, places].mean(-1))
            if Stat.DIAGONAL in statistics.values:
                self.ledger.put(
                    row, sig.ATTENTION_SELF.name, site.layer, statistics[Stat.DIAGONAL][row][:, places]
                )
            if Stat.GROUP_MASS in statistics.values:
                mass = statistics[Stat.GROUP_MASS][row, :, places[1:], 0]
                self.ledger.put(row, sig.FIRST_MASS.name, site.layer, _histogram(mass))
            if sig.VALUE_NORM in self.ledger.wanted and call.value.shape[-1]:
                norms = torch.linalg.vector_norm(call.value[row][:, places].float(), dim=-1)
                self.ledger.put(row, sig.VALUE_NORM.name, site.layer, norms)
                self.ledger.put(row, sig.VALUE_NORM_MEAN.name, site.layer, norms.mean(-1))
            if Stat.LEARNED_SINK in statistics.values:
                mass = statistics[Stat.LEARNED_SINK][row][:, places].mean(-1)
                self.ledger.put(row, sig.LEARNED_SINK_MASS.name, site.layer, mass)


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
    for signal in (sig.ATTENTION_RECEIVED, sig.ATTENTION_SELF, sig.ATTENTION_TOP1, sig.VALUE_NORM):
        if signal.name in arrays:
            arrays[signal.name] = np.ascontiguousarray(arrays[signal.name][:, :, kept])


def _histogram(mass: Tensor) -> Tensor:
    """`[head, query]` masses to `[head, bin]` counts."""
    bins = (mass * sig.FIRST_MASS_BINS).long().clamp(0, sig.FIRST_MASS_BINS - 1)
    counts = torch.zeros(len(mass), sig.FIRST_MASS_BINS, dtype=torch.int32, device=mass.device)
    return counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.int32))
