"""The vision tower's side of a prompt: norms of its patches, which of them are outliers, and the tokens they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from sinklens.inputs.spans import ModalitySpans
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord

from .visual import cells


def above_gap(norm: Float[np.ndarray, " patch"], gap: float) -> Bool[np.ndarray, " patch"]:
    """Patches above the widest step of the sorted norms; none if it is narrow or leaves more than a tenth above."""
    ordered = np.sort(norm)
    most = max(1, len(norm) // 10)
    if len(norm) < 2:
        return np.zeros(len(norm), dtype=bool)
    steps = ordered[-most:] / np.maximum(ordered[-most - 1 : -1], 1e-12)
    widest = int(steps.argmax())
    if steps[widest] < gap:
        return np.zeros(len(norm), dtype=bool)
    return norm >= ordered[-most:][widest]


@dataclass(frozen=True)
class Tower:
    """The vision tower's side of one prompt.

    Attributes:
        patches: Places in the tower's sequence that become part of a token.
        out: Which places are sinks, after each block.
        block: The one whose output the language model is given.
    """

    record: PromptRecord
    spans: ModalitySpans
    norms: Float[np.ndarray, "vision_layer patch"]
    patches: Int[np.ndarray, " place"]
    out: Bool[np.ndarray, "vision_layer patch"]
    block: int

    def tokens(self) -> Bool[np.ndarray, "vision_layer pos"]:
        """Tokens any of whose patches is a sink."""
        found = np.zeros((len(self.out), len(self.record)), dtype=bool)
        for _, grid, row, col, position in cells(self.spans):
            assert grid.members is not None
            places = grid.members[row, col]
            found[:, position] = self.out[:, places[places >= 0]].any(1)
        return found

    def largest(self) -> Float[np.ndarray, " pos"]:
        """The largest norm of the patches of each token, after the block that counts; NaN for other tokens."""
        found = np.full(len(self.record), np.nan)
        for _, grid, row, col, position in cells(self.spans):
            assert grid.members is not None
            places = grid.members[row, col]
            found[position] = self.norms[self.block, places[places >= 0]].max(initial=-np.inf)
        return np.where(np.isfinite(found), found, np.nan)


def patch_places(spans: ModalitySpans, length: int) -> Int[np.ndarray, " place"]:
    """Places of the vision tower's sequence that are patches of some token: no class token, no registers."""
    parts = [grid.members.ravel() for grid in spans.grids if grid.members is not None]
    places = np.unique(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.int64)
    return places[(places >= 0) & (places < length)]


def members_known(record: PromptRecord) -> bool:
    spans = record.spans
    length = record[sig.VISION_NORM].shape[1]
    return spans is not None and all(
        grid.members is not None and grid.members.max(initial=-1) < length for grid in spans.grids
    )


def attention_ratios(seen: Sequence[Tower]) -> Float[np.ndarray, " layer"] | None:
    """Attention of the text per vision-tower sink over that per other visual token, by layer; mean over prompts."""
    ratios = []
    for item in seen:
        tower = item.tokens()[item.block]
        others = item.spans.visual & ~tower
        if sig.TEXT_RECEIVED.name in item.record.arrays and tower.any() and others.any():
            received = item.record[sig.TEXT_RECEIVED].astype(np.float64)
            ratios.append(received[:, tower].mean(1) / received[:, others].mean(1))
    return np.mean(ratios, axis=0) if ratios else None
