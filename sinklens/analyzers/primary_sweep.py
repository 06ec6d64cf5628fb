"""The rule of primary-sinks at many epsilons in one reading: which positions are sinks, and the strongest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float

from .evidence import Column, SinkEvidence, column

if TYPE_CHECKING:
    from .primary_sinks import PrimarySinks


@dataclass(frozen=True)
class Swept:
    """One position at every epsilon.

    Attributes:
        peak: The largest share that any head in any prompt gives it.
        rate: In percent.
        sinks: Whether it is a row.
    """

    position: int
    peak: float
    share: float
    rate: Float[np.ndarray, " epsilon"]
    sinks: Bool[np.ndarray, " epsilon"]


def sweep(
    rule: PrimarySinks, evidence: list[SinkEvidence], grid: Float[np.ndarray, " epsilon"]
) -> Iterator[tuple[float, list[int], int]]:
    """Every epsilon, the positions that are sinks at it, strongest first, and the strongest position.

    Args:
        rule: Its own epsilon is not used.
        grid: Ascending.
    """
    peaks = _peaks(evidence)
    kept = [
        _swept(rule, column(evidence, k, rule.min_visible), peaks[k], grid)
        for k in sorted(rule.candidates(evidence))
    ]
    for i, epsilon in enumerate(grid.tolist()):
        reached = [at for at in kept if at.peak > epsilon] if rule.min_rate > 0 else kept
        sinks = [at for at in reached if at.sinks[i]]
        sinks.sort(key=lambda at: (-at.rate[i], -at.share, at.position))
        first = sinks[0] if sinks else max(reached or kept, key=lambda at: (at.rate[i], at.share))
        yield epsilon, [at.position for at in sinks], first.position


def _peaks(evidence: list[SinkEvidence]) -> dict[int, float]:
    """The largest share of every kept position over layers, heads and prompts."""
    peaks: dict[int, float] = {}
    for item in evidence:
        highest = np.where(np.isnan(item.alpha), -np.inf, item.alpha).max((0, 1))
        for position, value in zip(item.positions.tolist(), highest.tolist(), strict=True):
            peaks[position] = max(value, peaks.get(position, -np.inf))
    return peaks


def _swept(rule: PrimarySinks, found: Column, peak: float, grid: Float[np.ndarray, " epsilon"]) -> Swept:
    share, uniform = found.share.mean(), found.uniform.mean()
    rate, head = np.zeros(len(grid)), -np.inf
    if peak > grid[0]:
        n = int((~np.isnan(found.alpha)).sum())
        high = np.sort(found.alpha[found.alpha > grid[0]])
        rate = 100 * ((len(high) - np.searchsorted(high, grid, side="right")) / max(1, n))
        head = float(_decisive(found, rule.min_lift, rule.min_prompts).max(initial=-np.inf))
    wide = (rate >= 100 * rule.min_rate) & (share >= rule.min_lift * uniform)
    return Swept(found.position, peak, float(share), rate, (grid < head) | wide)


def _decisive(found: Column, lift: float, prompts: float) -> Float[np.ndarray, "layer head"]:
    """A head sinks at an epsilon if this exceeds it: of its shares that fulfil the lift, the k-th largest, where k
    prompts are enough. Minus infinity where too few do."""
    n = len(found.alpha)
    enough = np.flatnonzero(np.arange(n + 1) / n >= max(prompts, 1e-9))
    if not len(enough):
        return np.full(found.alpha.shape[1:], -np.inf)
    lifted = np.where(found.alpha > lift * found.uniform[:, None, None], found.alpha, -np.inf)
    return np.partition(lifted, n - enough[0], axis=0)[n - enough[0]]
