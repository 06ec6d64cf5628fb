"""One entry of the residual stream over all prompts in which it stands out: which steps write it, which erase it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sinklens.tracers import signals as sig
from sinklens.tracers.trace import Trace

from .traced_entries import (
    ATTENTION,
    BLOCK,
    MLP,
    Path,
    Step,
    follow,
    is_erased,
    may_stand_out,
    steps,
    told_apart,
)

Place = tuple[int, int]
"""position, dim"""

COMMON = 0.5


@dataclass(frozen=True)
class Group:
    """The same kind of step of one entry over the prompts: one sublayer of one block that writes it, or erases it.

    Attributes:
        steps, paths: Of the prompts in which it occurs.
        n_read: Prompts in which it would have been seen: the sublayers are told apart there, or the block as a whole
            adds too little. For a whole block: the sublayers are not told apart, but what the block adds is known.
    """

    layer: int
    part: str
    writes: bool
    steps: tuple[Step, ...]
    paths: tuple[Path, ...]
    n_read: int

    @property
    def agreement(self) -> float:
        """Share of the prompts that could show the step in which it occurs."""
        return len(self.steps) / self.n_read

    @property
    def share(self) -> float:
        """Mean share of the entry's peak over the prompts in which the step occurs."""
        return float(np.mean([step.share for step in self.steps]))

    @property
    def expert(self) -> int | None:
        return _usual([step.expert for step in self.steps])

    @property
    def neuron(self) -> int | None:
        return _usual([step.neuron for step in self.steps])

    @property
    def name(self) -> str:
        """`the MLP of block 1 (neuron 17)`"""
        part = {ATTENTION: "attention", MLP: "the MLP", BLOCK: ""}[self.part]
        where = f"{part} of block {self.layer}" if part else f"block {self.layer}"
        if self.expert is not None:
            where = f"expert {self.expert} of block {self.layer}"
        return where + (f" (neuron {self.neuron})" if self.neuron is not None else "")


@dataclass(frozen=True)
class Spike:
    """One (position, dim) over the prompts in which it stands out.

    Attributes:
        n_unread: Prompts besides in which it may stand out and was not among the entries that were recorded.
    """

    position: int
    dim: int
    paths: tuple[Path, ...]
    groups: tuple[Group, ...]
    n_unread: int = 0

    @property
    def sign(self) -> float:
        """The sign that the peak has in most prompts, + if as many have the other."""
        return 1.0 if sum(np.sign(path.peak) for path in self.paths) >= 0 else -1.0

    @property
    def same_sign(self) -> float:
        """Share of the prompts whose peak has that sign."""
        return float(np.mean([path.peak * self.sign > 0 for path in self.paths]))

    @property
    def peak(self) -> float:
        """Mean size, with the sign of most prompts: the signed mean, unless prompts differ in sign."""
        return self.sign * float(np.mean([abs(path.peak) for path in self.paths]))

    def aligned(self, path: Path) -> float:
        """-1 for a path whose peak has the other sign than most: what is averaged is mirrored there."""
        return 1.0 if path.peak * self.sign > 0 else -1.0

    @property
    def token(self) -> str:
        return Counter(path.record.pieces[self.position] for path in self.paths).most_common(1)[0][0]

    @property
    def erased(self) -> float:
        """Share of the prompts in which it falls below half of its peak before the last block ends."""
        return float(np.mean([is_erased(path) for path in self.paths]))

    def usual(self, *, writes: bool) -> list[Group]:
        """The steps of one direction that occur in half of the prompts that show them, in order of layer.

        A block as a whole is not named where some prompt tells its sublayers apart: it is the same step.
        """
        resolved = {(group.layer, group.writes) for group in self.groups if group.part != BLOCK}
        return [
            group
            for group in self.groups
            if group.writes == writes
            and group.agreement >= COMMON
            and (group.part != BLOCK or (group.layer, group.writes) not in resolved)
        ]


def trace_spike(
    trace: Trace, place: Place, spike_ratio: float, step: float, tolerance: float
) -> Spike | None:
    """One entry over all prompts in which it stands out; None if the trace followed it in none of them."""
    position, dim = place
    paths, n_unread = [], 0
    for record in (record for record in trace if position < len(record)):
        path = follow(record, position, dim)
        if path is not None and abs(path.peak) >= spike_ratio * record[sig.RESIDUAL_MEDIAN][path.peak_layer]:
            paths.append(path)
        else:
            n_unread += may_stand_out(record, path, spike_ratio)
    if not any(path.listed.any() for path in paths):
        return None
    found: dict[tuple[bool, int, str], list[tuple[Step, Path]]] = {}
    for path in paths:
        for item in steps(path, step, tolerance):
            found.setdefault((not item.writes, item.layer, item.part), []).append((item, path))
    known = np.array([~np.isnan(path.change) for path in paths])
    apart = np.array([told_apart(path, tolerance) for path in paths])
    little = np.array(
        [
            ~path.listed & (np.abs(np.nan_to_num(path.change, nan=np.inf)) < step * abs(path.peak))
            for path in paths
        ]
    )
    n_read = {True: (known & ~apart).sum(0), False: (apart | little).sum(0)}
    groups = tuple(
        Group(
            layer,
            part,
            not erases,
            tuple(s for s, _ in pairs),
            tuple(p for _, p in pairs),
            int(n_read[part == BLOCK][layer]),
        )
        for (erases, layer, part), pairs in sorted(found.items())
    )
    return Spike(position, dim, tuple(paths), groups, n_unread)


def share_written(spike: Spike) -> float:
    """Share of the peak that the writing steps up to the peak add, mean over prompts."""
    total = sum(step.share for group in spike.groups if group.writes for step in group.steps)
    return total / len(spike.paths)


def _usual(values: Sequence[int]) -> int | None:
    known = [value for value in values if value >= 0]
    return Counter(known).most_common(1)[0][0] if known else None
