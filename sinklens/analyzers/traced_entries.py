"""One entry of the residual stream followed through the blocks: which block adds how much of it, and by what part."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord

ATTENTION, MLP, BLOCK = "attention", "mlp", "block"
"""What adds to the stream; `block` where the two cannot be told apart."""

SIGNALS = frozenset(
    {
        sig.RESIDUAL_AFTER,
        sig.RESIDUAL_BEFORE,
        sig.ATTENTION_WRITE,
        sig.MLP_WRITE,
        sig.WRITE_EXPERT,
        sig.WRITE_EXPERT_VALUE,
        sig.WRITE_NEURON,
        sig.WRITE_NEURON_VALUE,
    }
)


@dataclass(frozen=True)
class Path:
    """The values of one (position, dim) of one prompt after every block, and what the blocks added.

    Where a block did not list the entry among its strongest, what its sublayers added is NaN; the value after it may
    still be known, from the block that follows or from the longer list of largest entries. It counts as 0 where it
    is in no list and even the smallest listed entry is below `NEGLIGIBLE` times the path's peak.

    Attributes:
        listed: Whether the block traced the entry to its sublayers.
        after: Value after the block.
        attention, mlp: What the sublayers add; both NaN where the sum was not verified.
        expert, neuron: What wrote most of `mlp`, -1 if not looked up.
        expert_value, neuron_value: Its part.
    """

    record: PromptRecord
    position: int
    dim: int
    listed: Bool[np.ndarray, " layer"]
    after: Float[np.ndarray, " layer"]
    before: Float[np.ndarray, " layer"]
    attention: Float[np.ndarray, " layer"]
    mlp: Float[np.ndarray, " layer"]
    expert: Int[np.ndarray, " layer"]
    expert_value: Float[np.ndarray, " layer"]
    neuron: Int[np.ndarray, " layer"]
    neuron_value: Float[np.ndarray, " layer"]

    @property
    def peak_layer(self) -> int:
        """The block after which the entry is largest."""
        return int(np.nanargmax(np.abs(self.after)))

    @property
    def peak(self) -> float:
        """Signed value there."""
        return float(self.after[self.peak_layer])

    @property
    def change(self) -> Float[np.ndarray, " layer"]:
        """What each block adds, NaN where not known."""
        return self.after - self.before


@dataclass(frozen=True)
class Step:
    """A block that adds to an entry, or takes from it, a good part of its peak.

    Attributes:
        writes: Whether it adds (else it takes away).
        value: What this sublayer adds, signed.
        share: The same over the peak: positive where it writes, negative where it erases.
    """

    layer: int
    part: str
    writes: bool
    value: float
    share: float
    expert: int
    expert_value: float
    neuron: int
    neuron_value: float


def follow(record: PromptRecord, position: int, dim: int) -> Path | None:
    """The path of an entry through the blocks; None if its value is known after none of them."""
    listed = (record["residual_after_pos"] == position) & (record["residual_after_dim"] == dim)
    listed &= ~np.isnan(record[sig.RESIDUAL_AFTER])
    ranked = among_largest(record, position, dim)
    if not listed.any() and np.isnan(ranked).all():
        return None
    at, known = listed.argmax(1), listed.any(1)

    def read(signal: sig.Signal, missing: float) -> np.ndarray:
        if signal.name not in record.arrays:
            return np.full(len(at), missing)
        values = np.take_along_axis(record[signal], at[:, None], axis=1)[:, 0]
        return np.where(known, values, missing)

    after, before = read(sig.RESIDUAL_AFTER, np.nan), read(sig.RESIDUAL_BEFORE, np.nan)
    # What leaves one block enters the next. (Not so where the stream is read inside the block: see `is_continuous`.)
    continuous = is_continuous(after, before)
    after = np.where(np.isnan(after), ranked, after)
    if continuous:
        after[:-1] = np.where(np.isnan(after[:-1]), before[1:], after[:-1])
        before[1:] = np.where(np.isnan(before[1:]), after[:-1], before[1:])
    _fill_negligible(record, after, before)
    return Path(
        record,
        position,
        dim,
        known,
        after.astype(np.float64),
        before.astype(np.float64),
        read(sig.ATTENTION_WRITE, np.nan).astype(np.float64),
        read(sig.MLP_WRITE, np.nan).astype(np.float64),
        read(sig.WRITE_EXPERT, -1).astype(int),
        read(sig.WRITE_EXPERT_VALUE, np.nan).astype(np.float64),
        read(sig.WRITE_NEURON, -1).astype(int),
        read(sig.WRITE_NEURON_VALUE, np.nan).astype(np.float64),
    )


def among_largest(record: PromptRecord, position: int, dim: int) -> Float[np.ndarray, " layer"]:
    """The entry's value after each block by the list of largest entries, which is longer; NaN where it is not there."""
    here = (record["residual_top_pos"] == position) & (record["residual_top_dim"] == dim)
    values = np.take_along_axis(record[sig.RESIDUAL_TOP], here.argmax(1)[:, None], axis=1)[:, 0]
    return np.where(here.any(1), values, np.nan)


NEGLIGIBLE = 0.02


def _fill_negligible(
    record: PromptRecord, after: Float[np.ndarray, " layer"], before: Float[np.ndarray, " layer"]
) -> None:
    """Write 0 for values that are not listed and so cannot exceed `NEGLIGIBLE` times the largest known one."""
    least = NEGLIGIBLE * np.nanmax(np.abs(np.concatenate([after, before])))
    inputs = record[sig.RESIDUAL_BEFORE][:, sig.ENTRIES // 2 :]
    after[np.isnan(after) & (smallest_listed(record[sig.RESIDUAL_TOP]) <= least)] = 0.0
    before[np.isnan(before) & (smallest_listed(inputs) <= least)] = 0.0


def smallest_listed(values: Float[np.ndarray, "layer rank"]) -> Float[np.ndarray, " layer"]:
    """How large an entry can be that is not in the list: 0 where the list is not full, inf where it is empty."""
    known = ~np.isnan(values)
    smallest = np.where(known, np.abs(values), np.inf).min(1)
    return np.where(known.any(1) & ~known.all(1), 0.0, smallest)


def may_stand_out(record: PromptRecord, path: Path | None, ratio: float) -> bool:
    """Whether an entry that is not known to reach `ratio` times a layer's median may do so after another block.

    Where it is not among the listed entries of a block, it is at most as large as the smallest of them.
    """
    bound = smallest_listed(record[sig.RESIDUAL_TOP])
    unknown = np.ones(len(bound), dtype=bool) if path is None else np.isnan(path.after)
    return bool((unknown & (bound > 0) & (bound >= ratio * record[sig.RESIDUAL_MEDIAN])).any())


def is_continuous(after: Float[np.ndarray, " layer"], before: Float[np.ndarray, " layer"]) -> bool:
    """Whether the value after each block is the value before the next, where both are known (to 1 %)."""
    left, right = after[:-1], before[1:]
    both = ~np.isnan(left) & ~np.isnan(right)
    size = np.maximum(np.abs(left[both]), np.abs(right[both]))
    return bool((np.abs(left[both] - right[both]) <= 0.01 * size).all())


def steps(path: Path, share: float, tolerance: float) -> list[Step]:
    """The blocks that add or take at least `share` of the peak, in order of layer, by sublayer.

    Args:
        tolerance: Where after - before differs from attention + mlp by more than this part of the larger of the
            two values, the sublayers are not told apart.
    """
    found = []
    for layer in np.flatnonzero(~np.isnan(path.change)):
        for part, value in _contributions(path, int(layer), tolerance):
            if abs(value) >= share * abs(path.peak):
                found.append(_step(path, int(layer), part, value))
    return found


def _contributions(path: Path, layer: int, tolerance: float) -> list[tuple[str, float]]:
    """What a block adds: by sublayer where that is known, else as a whole."""
    if not told_apart(path, tolerance)[layer]:
        return [(BLOCK, float(path.change[layer]))]
    return [(ATTENTION, float(path.attention[layer])), (MLP, float(path.mlp[layer]))]


def told_apart(path: Path, tolerance: float) -> Bool[np.ndarray, " layer"]:
    """Whether what attention and the feed-forward part add is known of each block."""
    return np.nan_to_num(residue(path), nan=np.inf) <= tolerance


def residue(path: Path) -> Float[np.ndarray, " layer"]:
    """How far each block is from before + attention + mlp = after, relative; NaN where a part is not known."""
    size = np.fmax(np.abs(path.after), np.abs(path.before))
    gap = np.abs(path.change - path.attention - path.mlp)
    return gap / np.where(size > 0, size, np.nan)


def _step(path: Path, layer: int, part: str, value: float) -> Step:
    by_mlp = part == MLP
    return Step(
        layer,
        part,
        value * path.peak > 0,
        value,
        value / path.peak,
        int(path.expert[layer]) if by_mlp else -1,
        float(path.expert_value[layer]) if by_mlp else float("nan"),
        int(path.neuron[layer]) if by_mlp else -1,
        float(path.neuron_value[layer]) if by_mlp else float("nan"),
    )


def is_erased(path: Path) -> bool:
    """Whether the entry falls below half of its peak later on; unknown values do not count as fallen."""
    later = path.after[path.peak_layer :] / path.peak
    return bool((later[~np.isnan(later)] < 0.5).any())


def largest_residue(records: Iterable[PromptRecord]) -> float | None:
    """Largest |after - before - attention - mlp| over the larger of the two values, over all traced entries.

    Entries whose parts are unknown do not count; None if no entry has them.
    """
    worst = None
    parts = {sig.ATTENTION_WRITE.name, sig.MLP_WRITE.name}
    for record in (record for record in records if parts <= record.arrays.keys()):
        after, before = record[sig.RESIDUAL_AFTER].astype(float), record[sig.RESIDUAL_BEFORE].astype(float)
        gap = np.abs(after - before - record[sig.ATTENTION_WRITE] - record[sig.MLP_WRITE])
        size = np.maximum(np.abs(after), np.abs(before))
        with np.errstate(invalid="ignore", divide="ignore"):
            relative = np.where(size > 0, gap / size, np.nan)
        if not np.isnan(relative).all():
            worst = max(worst or 0.0, float(np.nanmax(relative)))
    return worst
