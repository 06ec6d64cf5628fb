"""Tokens whose hidden state takes the direction of the primary sink's: who, from which layer on, for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord

from .evidence import norm_sinks

SECONDARY, WITH_PRIMARY, NOISE = "secondary", "bos_sink", "noise"
PAPER_MARGIN, PAPER_SHORTEST = 15, 4


@dataclass(frozen=True)
class Primary:
    """The primary sink of one prompt: the position, the layers it is active in, and how alike every token is to it.

    Attributes:
        start, end: It is active after the blocks start .. end - 1.
        cosine: Signed cosine of every state with its state, NaN outside the active layers and where the trace did
            not compare with this position.
        unknown: Active layers whose cosines were not recorded.
    """

    position: int
    start: int
    end: int
    cosine: Float[np.ndarray, "layer pos"]
    unknown: int

    @property
    def lifetime(self) -> int:
        """Active layers with known cosines: what a lifetime is measured against."""
        return self.end - self.start - self.unknown


@dataclass(frozen=True)
class Aligned:
    """A token aligned with the primary sink in some layers of one prompt.

    Attributes:
        cosine: Signed mean over the aligned layers.
        score: Mean attention from other queries over aligned layers and heads; NaN if too few queries see it.
        with_self: The score includes the token's attention to itself (it was not stored apart).
        write_norm: Norm of what the feed-forward part adds at the creation layer, NaN if not recorded.
        write_share: The same over the norm of the state after that block.
        parts: Cosine with the primary's counterpart inside that feed-forward part, in the order of `PARTS`.
    """

    prompt: int
    position: int
    token_id: int
    piece: str
    kind: str
    layers: tuple[int, ...]
    cosine: float
    score: float
    with_self: bool
    write_norm: float
    write_share: float
    parts: tuple[float, ...]

    @property
    def creation(self) -> int:
        return self.layers[0]

    @property
    def lifetime(self) -> int:
        """Number of aligned layers; layers between them in which it is not aligned do not count."""
        return len(self.layers)


def active_range(norm: Float[np.ndarray, " layer"], before: float, *, paper: bool) -> tuple[int, int]:
    """Layers `start .. end - 1` between the largest rise of a position's norm and the largest fall after it.

    Args:
        before: Norm to stand for the input of the first block.
        paper: As the authors' code does: the first block is not examined, and the list of states ends with the one
            after the final norm, which is small, so that an unerased sink ends one layer early.
    """
    layers = len(norm)
    if paper:
        start = int(np.argmax(np.diff(norm))) + 1 if layers > 1 else 0
        fall = np.diff(np.concatenate([norm[:-1], [0.0]]))[start:]
        return start, start + 1 + int(np.argmin(fall)) if len(fall) else layers
    start = int(np.argmax(np.diff(np.concatenate([[before], norm]))))
    fall = np.diff(norm)[start:]
    if not len(fall):
        return start, layers
    last = start + int(np.argmin(fall))
    return start, last + 1 if norm[last + 1] <= norm[last] / 2 else layers


def find_primary(record: PromptRecord, ratio: float, *, paper: bool) -> Primary | str:
    """The position with the largest mean norm among those that stand out by norm and were compared with.

    Positions that were compared in half of their active layers or more come before the others.

    Returns:
        The primary sink, or why there is none: `no norm sink` or `not compared`.
    """
    norm = record[sig.RESIDUAL_NORM].astype(np.float64)
    found = sorted(norm_sinks([record], ratio))
    if not found:
        return "no norm sink"
    candidates = [_primary(record, norm, position, paper) for position in found]
    candidates = [candidate for candidate in candidates if candidate.lifetime > 0]
    if not candidates:
        return "not compared"
    return max(candidates, key=lambda c: (c.unknown <= c.lifetime, norm[:, c.position].mean(), -c.position))


def _primary(
    record: PromptRecord, norm: Float[np.ndarray, "layer pos"], position: int, paper: bool
) -> Primary:
    start, end = active_range(norm[:, position], float(np.median(norm[0])), paper=paper)
    slots = record[sig.REFERENCE_POSITION] == position
    if position == 0:
        # Slot 0 is always the first token, also in layers without attention, which record no position.
        slots[:, 0] |= ~np.isnan(record[sig.RESIDUAL_COSINE][:, 0, 0])
    cosine = np.full(norm.shape, np.nan)
    unknown = 0
    for layer in range(start, end):
        at = np.flatnonzero(slots[layer])
        if len(at):
            cosine[layer] = record[sig.RESIDUAL_COSINE][layer, at[0]]
        else:
            unknown += 1
    return Primary(position, start, end, cosine, unknown)


def is_aligned(
    record: PromptRecord, primary: Primary, *, at: float, norm_gate: float, later_only: bool
) -> Bool[np.ndarray, "layer pos"]:
    """Where |cosine| exceeds `at` and the state's norm is at least `norm_gate` times the layer's median norm."""
    norm = record[sig.RESIDUAL_NORM].astype(np.float64)
    aligned = np.nan_to_num(np.abs(primary.cosine)) > at
    aligned &= norm >= norm_gate * _lower_median(norm)[:, None]
    aligned[:, primary.position] = False
    if later_only:
        aligned[:, : primary.position] = False
    return aligned


def _lower_median(norm: Float[np.ndarray, "layer pos"]) -> Float[np.ndarray, " layer"]:
    middle = (norm.shape[1] - 1) // 2
    return np.partition(norm, middle, axis=1)[:, middle]


def label(layers: Sequence[int], primary: Primary, total: int, *, paper: bool) -> str:
    """What kind of token it is, by creation layer and lifetime.

    The paper's bounds are absolute: secondary if 4 < lifetime < total layers - 15, with the primary if longer.
    Ours are relative to the primary's own lifetime P: noise up to min(4, P / 8) layers or a single one; with the
    primary from 3/4 P on or if created within two layers of it; secondary otherwise.
    """
    lifetime = len(layers)
    if paper:
        if lifetime >= total - PAPER_MARGIN:
            return WITH_PRIMARY
        return SECONDARY if lifetime > PAPER_SHORTEST else NOISE
    if lifetime <= max(1.0, min(PAPER_SHORTEST, primary.lifetime / 8)):
        return NOISE
    early = layers[0] < primary.start + 2
    return WITH_PRIMARY if early or lifetime >= 0.75 * primary.lifetime else SECONDARY


def aligned_tokens(
    record: PromptRecord,
    primary: Primary,
    aligned: Bool[np.ndarray, "layer pos"],
    *,
    paper: bool,
    min_visible: int,
) -> list[Aligned]:
    """Every token aligned in at least one layer, in order of position."""
    received, exact = received_from_others(record)
    visible = record[sig.VISIBLE_QUERIES].max(0)
    enough = min(min_visible, int(visible.max()))
    found = []
    for position in np.flatnonzero(aligned.any(0)):
        layers = np.flatnonzero(aligned[:, position])
        seen = visible[position] >= enough
        norm, share, parts = _birth(record, primary, int(position), int(layers[0]))
        found.append(
            Aligned(
                record.index,
                int(position),
                int(record.token_ids[position]),
                record.pieces[position],
                label(layers.tolist(), primary, len(aligned), paper=paper),
                tuple(layers.tolist()),
                float(primary.cosine[layers, position].mean()),
                _mean(received[layers, position]) if seen else float("nan"),
                bool(not exact[position]),
                norm,
                share,
                parts,
            )
        )
    return found


def received_from_others(
    record: PromptRecord,
) -> tuple[Float[np.ndarray, "layer pos"], Bool[np.ndarray, " pos"]]:
    """Mean attention over heads that a position receives from the other queries that see it.

    Returns:
        The means, NaN where no other query sees the position; and the positions where attention to oneself is
        really left out. Elsewhere only the mean that includes it is stored.
    """
    visible = record[sig.VISIBLE_QUERIES].astype(np.float64)
    mean = record[sig.ATTENTION_RECEIVED_MEAN].astype(np.float64).copy()
    kept = record[sig.KEPT_POSITIONS]
    seen = visible[:, None, kept]
    others = (record[sig.ATTENTION_RECEIVED] * seen - record[sig.ATTENTION_SELF]) / np.where(
        seen > 1, seen - 1, np.nan
    )
    mean[:, kept] = others.mean(1)
    mean[visible <= 1] = np.nan
    exact = np.zeros(mean.shape[1], dtype=bool)
    exact[kept] = True
    return mean, exact


def _birth(
    record: PromptRecord, primary: Primary, position: int, layer: int
) -> tuple[float, float, tuple[float, ...]]:
    """Norm and share of what the feed-forward part wrote at the creation layer, and the cosines inside it."""
    at = np.flatnonzero(
        (record[sig.BIRTH_LAYER] == layer)
        & (record[sig.BIRTH_POSITION] == position)
        & (record[sig.BIRTH_REFERENCE] == primary.position)
    )
    if not len(at):
        return float("nan"), float("nan"), (float("nan"),) * len(sig.PARTS)
    norm = float(record[sig.BIRTH_WRITE_NORM][at[0]])
    after = max(float(record[sig.RESIDUAL_NORM][layer, position]), float(np.finfo(np.float32).tiny))
    return norm, norm / after, tuple(map(float, record[sig.BIRTH_COSINE][at[0]]))


def _mean(values: Float[np.ndarray, " n"]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


@dataclass(frozen=True)
class Level:
    """A sink level: tokens created at about the same layer that live for about the same number of layers."""

    creation: int
    lifetime: int
    tokens: int


def sink_levels(tokens: Sequence[Aligned], at_least: int) -> list[Level]:
    """Cells of (creation layer, lifetime) that hold `at_least` tokens, in order of creation.

    The fullest cell takes in its neighbours within one layer in both directions, then the fullest of those left.
    """
    cells: dict[tuple[int, int], int] = {}
    for token in tokens:
        cell = (token.creation, token.lifetime)
        cells[cell] = cells.get(cell, 0) + 1
    levels = []
    while cells:
        creation, lifetime = min(cells, key=lambda cell: (-cells[cell], cell))
        near = [c for c in cells if abs(c[0] - creation) <= 1 and abs(c[1] - lifetime) <= 1]
        levels.append(Level(creation, lifetime, sum(cells.pop(cell) for cell in near)))
    return sorted(
        (level for level in levels if level.tokens >= at_least),
        key=lambda level: (level.creation, level.lifetime),
    )


TOKEN_CLASSES = ("newline", "punctuation", "digit", "word", "other")


def token_class(piece: str) -> str:
    """Newline, punctuation, digit, word or other, from the piece as displayed."""
    if "\n" in piece or "\r" in piece:
        return "newline"
    text = piece.strip()
    if not text:
        return "other"
    if all(not char.isalnum() for char in text):
        return "punctuation" if any(_is_punctuation(char) for char in text) else "other"
    if all(char.isdigit() or not char.isalnum() for char in text):
        return "digit"
    # Special tokens such as <s> are no words.
    return "other" if text.startswith("<") and text.endswith(">") else "word"


def _is_punctuation(char: str) -> bool:
    from unicodedata import category

    return category(char)[0] in "PS"


def norm_correlations(secondary: Sequence[Aligned]) -> dict[str, Any]:
    """Spearman's rho of the written norm with score and with lifetime; None for fewer than 5 tokens or no spread."""
    pairs = {
        "norm_score": [(token.write_norm, token.score) for token in secondary],
        "norm_lifetime": [(token.write_norm, float(token.lifetime)) for token in secondary],
    }
    out: dict[str, Any] = {}
    for name, values in pairs.items():
        known = np.array([pair for pair in values if not np.isnan(pair).any()]).reshape(-1, 2)
        out[f"{name}_rho"] = _spearman(known)
        out[f"{name}_n"] = len(known)
    return out


def _spearman(pairs: Float[np.ndarray, "n 2"]) -> float | None:
    from scipy.stats import rankdata

    if len(pairs) < 5 or (np.ptp(pairs, axis=0) == 0).any():
        return None
    return float(np.corrcoef(rankdata(pairs[:, 0]), rankdata(pairs[:, 1]))[0, 1])
