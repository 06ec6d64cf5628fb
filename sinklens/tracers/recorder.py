"""From what the taps see to the records of a batch: one accumulator per tap, joined at the end of the pass.

Padding is dropped here and nowhere later: a record knows only the real tokens of its prompt, numbered from 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sinklens.inputs.spec import Prompt
from sinklens.kernels.magnitudes import largest_magnitudes, lower_median_magnitude
from sinklens.kernels.spec import AttentionCall, AttentionStatistics, Stat, Want

from . import signals as sig
from .attention import Site
from .batch import Batch
from .experts import Routed
from .signals import Signal
from .trace import PromptRecord

Arrays = dict[str, np.ndarray]

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


@dataclass(frozen=True)
class Limits:
    """How much a record keeps.

    Attributes:
        leading: First positions that are always kept per head.
        strongest: Positions kept besides, those to which any one head gives most. The peak of every position
            is recorded, so an analyzer can tell whether one that was left out could have mattered.
        ranks: Entries kept per layer in ranked signals.
        min_visible: Queries that must see a position before it can be one of the strongest.
    """

    leading: int = 16
    strongest: int = 48
    ranks: int = 64
    min_visible: int = 16


class Recorder:
    """Collects one batch. `real[b]` are the places of prompt b's real tokens in the padded row."""

    def __init__(self, batch: Batch, layers: int, wanted: Iterable[Signal], limits: Limits) -> None:
        self.batch, self.layers, self.wanted, self.limits = batch, layers, frozenset(wanted), limits
        self.real: list[Tensor] | None = None
        if batch.valid is not None:
            self.real = [row.nonzero().squeeze(-1) for row in batch.valid]
        self._seen: list[dict[str, dict[int, np.ndarray]]] = [{} for _ in range(batch.size)]
        self.routed_rows = 0

    # attention -------------------------------------------------------------------------------------------------

    def asks(self, site: Site, call: AttentionCall) -> Want:
        """The statistics the wanted signals need; the one key group is the first real token."""
        stats = {STATS_OF[signal] for signal in self.wanted if signal in STATS_OF}
        if call.learned_sinks is None:
            stats.discard(Stat.LEARNED_SINK)
        if Stat.GROUP_MASS not in stats:
            return Want(frozenset(stats))
        first = torch.zeros(1, call.key.shape[0], call.key.shape[2], dtype=torch.bool, device=call.key.device)
        for row, places in enumerate(self._places(call.key.shape[2], call.key.device)):
            first[0, row, places[:1]] = True
        return Want(frozenset(stats), groups=first)

    def on_attention(self, site: Site, call: AttentionCall, statistics: AttentionStatistics) -> None:
        """Reduce one layer's statistics to per-prompt arrays on the CPU."""
        assert statistics.visible is not None
        for row, places in enumerate(self._places(call.key.shape[2], call.key.device)):
            visible = statistics.visible[row, :, places]
            self._put(row, sig.VISIBLE_QUERIES.name, site.layer, visible.amax(0).to(torch.int32))
            for signal, stat in _PER_KEY.items():
                if stat in statistics.values:
                    share = statistics[stat][row][:, places] / visible.clamp(min=1)
                    self._put(row, signal.name, site.layer, share)
            for signal, stat in _PER_ROW.items():
                if signal in self.wanted:
                    self._put(row, signal.name, site.layer, statistics[stat][row][:, places].mean(-1))
            if Stat.DIAGONAL in statistics.values:
                self._put(row, sig.ATTENTION_SELF.name, site.layer, statistics[Stat.DIAGONAL][row][:, places])
            if Stat.GROUP_MASS in statistics.values:
                mass = statistics[Stat.GROUP_MASS][row, :, places[1:], 0]
                self._put(row, sig.FIRST_MASS.name, site.layer, _histogram(mass))
            if sig.VALUE_NORM in self.wanted and call.value.shape[-1]:
                norms = torch.linalg.vector_norm(call.value[row][:, places].float(), dim=-1)
                self._put(row, sig.VALUE_NORM.name, site.layer, norms)
                self._put(row, sig.VALUE_NORM_MEAN.name, site.layer, norms.mean(-1))
            if Stat.LEARNED_SINK in statistics.values:
                mass = statistics[Stat.LEARNED_SINK][row][:, places].mean(-1)
                self._put(row, sig.LEARNED_SINK_MASS.name, site.layer, mass)

    # hidden states ---------------------------------------------------------------------------------------------

    def on_residual(self, layer: int, state: Tensor) -> None:
        for row, x in self._rows(state):
            self._put(row, sig.RESIDUAL_NORM.name, layer, torch.linalg.vector_norm(x.float(), dim=-1))
            if sig.RESIDUAL_TOP in self.wanted:
                self._put_largest(row, sig.RESIDUAL_TOP, layer, x)
            if sig.RESIDUAL_MEDIAN in self.wanted:
                self._put(row, sig.RESIDUAL_MEDIAN.name, layer, torch.tensor(lower_median_magnitude(x)))

    def on_down_proj(self, layer: int, output: Tensor) -> None:
        for row, x in self._rows(output):
            self._put_largest(row, sig.DOWN_PROJ_TOP, layer, x)

    def _put_largest(self, row: int, signal: Signal, layer: int, x: Tensor) -> None:
        top = largest_magnitudes(x, self.limits.ranks)
        missing = self.limits.ranks - len(top.value)
        pad = torch.nn.functional.pad
        self._put(row, signal.name, layer, pad(top.value, (0, missing), value=float("nan")))
        self._put(row, f"{signal.name}_pos", layer, pad(top.pos, (0, missing), value=-1))
        self._put(row, f"{signal.name}_dim", layer, pad(top.dim, (0, missing), value=-1))

    # experts ---------------------------------------------------------------------------------------------------

    def on_experts(self, site: Site, routed: Routed) -> None:
        """Per-prompt maxima over the routed rows; padding is routed too and is dropped here."""
        tokens = len(routed.expert) // routed.slots
        expert = routed.expert.view(self.batch.size, tokens // self.batch.size, routed.slots)
        self.routed_rows += int((expert < routed.n_experts).sum())
        fields = {name: getattr(routed, name).view(expert.shape) for name in ("value", "dim", "weight")}
        for row, places in enumerate(self._places(expert.shape[1], expert.device)):
            mine = {name: field[row][places].cpu().numpy() for name, field in fields.items()}
            chosen = expert[row][places].cpu().numpy()
            for name, array in _expert_maxima(chosen, mine["value"], mine["dim"], routed.n_experts).items():
                self._put(row, name, site.layer, array)
            self._put(row, sig.ROUTER_CHOICE.name, site.layer, chosen.astype(np.int32))
            self._put(row, sig.ROUTER_WEIGHT.name, site.layer, mine["weight"])

    # joining ---------------------------------------------------------------------------------------------------

    def records(self) -> list[PromptRecord]:
        """The records of the batch, one per prompt, in batch order."""
        return [self._record(row) for row in range(self.batch.size)]

    def _record(self, row: int) -> PromptRecord:
        arrays = {name: _join(by_layer, self.layers) for name, by_layer in self._seen[row].items()}
        if sig.ATTENTION_RECEIVED.name in arrays:
            _keep_positions(arrays, self.limits)
        for name in (sig.ROUTER_CHOICE.name, sig.ROUTER_WEIGHT.name):
            if name in arrays and sig.KEPT_POSITIONS.name in arrays:
                arrays[name] = arrays[name][:, arrays[sig.KEPT_POSITIONS.name]]
        prompt = self.batch.prompts[row] if self.batch.prompts else _anonymous(row, len(self._tokens(row)))
        return PromptRecord(
            prompt.index,
            np.asarray(prompt.token_ids, dtype=np.int64),
            prompt.pieces,
            prompt.source,
            prompt.domain,
            arrays,
        )

    def _tokens(self, row: int) -> Tensor:
        if self.real is not None:
            return self.real[row]
        norms = (
            self._seen[row].get(sig.RESIDUAL_NORM.name) or self._seen[row].get(sig.VISIBLE_QUERIES.name) or {}
        )
        return torch.arange(len(next(iter(norms.values()), ())))

    def _places(self, length: int, device: torch.device) -> list[Tensor]:
        if self.real is not None:
            return [places.to(device) for places in self.real]
        return [torch.arange(length, device=device)] * self.batch.size

    def _rows(self, state: Tensor) -> Iterable[tuple[int, Tensor]]:
        """The real tokens of each prompt, `[pos, dim]`; flat outputs are unfolded first."""
        state = state.detach().reshape(self.batch.size, -1, state.shape[-1])
        for row, places in enumerate(self._places(state.shape[1], state.device)):
            whole = len(places) == state.shape[1]
            yield row, state[row] if whole else state[row][places]

    def _put(self, row: int, name: str, layer: int, value: Tensor | np.ndarray) -> None:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        self._seen[row].setdefault(name, {})[layer] = array


def _anonymous(row: int, length: int) -> Prompt:
    return Prompt(row, (-1,) * length, ("",) * length, f"input:{row}")


def _join(by_layer: dict[int, np.ndarray], layers: int) -> np.ndarray:
    """Stack the layers that were seen; the others hold NaN or -1."""
    sample = next(iter(by_layer.values()))
    fill = np.nan if np.issubdtype(sample.dtype, np.floating) else -1
    joined = np.full((layers, *sample.shape), fill, dtype=sample.dtype)
    for layer, array in by_layer.items():
        joined[layer] = array
    return joined


def _keep_positions(arrays: Arrays, limits: Limits) -> None:
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


def _expert_maxima(expert: np.ndarray, value: np.ndarray, dim: np.ndarray, n_experts: int) -> Arrays:
    """Per expert: the largest entry with its place, the first routed row, and the number of tokens.

    Args:
        expert, value, dim: `[pos, slot]`, as in `Routed`.
    """
    pos, slot = np.indices(expert.shape).reshape(2, -1)
    flat, magnitude = expert.ravel(), np.abs(value).ravel()
    keep = flat < n_experts
    pos, slot, flat, magnitude = pos[keep], slot[keep], flat[keep], magnitude[keep]
    out = {
        "expert_max": np.full(n_experts, np.nan, dtype=np.float32),
        "expert_max_pos": np.full(n_experts, -1, dtype=np.int32),
        "expert_max_dim": np.full(n_experts, -1, dtype=np.int32),
        "expert_first_row": np.full(n_experts, np.nan, dtype=np.float32),
        "expert_tokens": np.bincount(flat, minlength=n_experts).astype(np.int32),
    }
    by_size = np.lexsort((pos, -magnitude, flat))
    seen, first = np.unique(flat[by_size], return_index=True)
    top = by_size[first]
    out["expert_max"][seen] = value[pos[top], slot[top]]
    out["expert_max_pos"][seen] = pos[top]
    out["expert_max_dim"][seen] = dim[pos[top], slot[top]]
    # Per-expert loops order routed rows by slot, then token.
    by_slot = np.lexsort((pos, slot, flat))
    seen, first = np.unique(flat[by_slot], return_index=True)
    out["expert_first_row"][seen] = magnitude[by_slot[first]]
    return out
