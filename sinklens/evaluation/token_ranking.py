"""Which visual tokens a pruner keeps: the largest of corrected scores, or the most different features."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from jaxtyping import Bool, Float, Int

from sinklens.core.errors import UsageError
from sinklens.core.recency import recency_weights
from sinklens.inputs.spans import ModalitySpans


def kept_count(share: float, tokens: int) -> int:
    """Tokens that a pruner keeps: the share rounded to whole tokens (half up), at least one.

    Raises:
        UsageError: A share that is not above 0 and below 1.
    """
    if not 0.0 < share < 1.0:
        raise UsageError(
            f"keep is the share of the visual tokens that stay, above 0 and below 1; got {share}."
        )
    return max(1, int(np.floor(share * tokens + 0.5)))


def detrended(scores: Float[np.ndarray, " token"], sigma: float) -> Float[np.ndarray, " token"]:
    """Position debiasing (PD, arXiv 2508.17807): scores over exp(sigma i / T), in the order of the tokens.

    The fit's mu is left out: it changes no ranking.
    """
    return scores * recency_weights(sigma, len(scores))


def without_padding(
    scores: Float[np.ndarray, " token"], padding: Float[np.ndarray, " token"], least: float = 0.5
) -> Float[np.ndarray, " token"]:
    """Padding-attention suppression (PAS, arXiv 2508.17807): 0 for tokens whose cell is padding.

    Args:
        padding: Part of each token's cell that is padding.
        least: From which part on a cell counts as padding. The authors' programs use 0.5 for most pruners and 0.01 for
            one.
    """
    return np.where(padding >= least, 0.0, scores)


def padding_shares(spans: ModalitySpans) -> Float[np.ndarray, " token"]:
    """Part of each visual token's cell that lies outside its picture, by the boxes of the grids.

    0 throughout where the processor does not pad, as in most: it crops, squashes, or keeps the proportions.
    """
    parts = np.zeros(len(spans.kinds))
    for grid in spans.grids:
        picture = spans.pictures[grid.picture]
        for row, col in np.argwhere(grid.positions >= 0).tolist():
            left, top, right, bottom = grid.cell_box(row, col)
            wide = min(right, picture.width) - max(left, 0.0)
            high = min(bottom, picture.height) - max(top, 0.0)
            shown = max(wide, 0.0) * max(high, 0.0) / ((right - left) * (bottom - top))
            parts[grid.positions[row, col]] = 1.0 - shown
    return parts[spans.visual]


def largest(
    scores: Float[np.ndarray, " token"],
    count: int,
    *,
    first: Collection[int] = (),
    never: Collection[int] = (),
) -> Int[np.ndarray, " kept"]:
    """Places of the `count` largest scores, in order of place; of equal scores the earlier token is taken.

    Args:
        first: Places that are taken before all others, the larger scores first if there are too many.
        never: Places that are taken only if nothing else is left.
    """
    rank = np.zeros(len(scores))
    rank[list(never)] = -1
    rank[list(first)] = 1
    order = np.lexsort((np.arange(len(scores)), -scores, -rank))
    return np.sort(order[:count])


def most_different(
    features: Float[np.ndarray, "token dim"],
    count: int,
    *,
    first: Collection[int] = (),
    never: Collection[int] = (),
) -> Int[np.ndarray, " kept"]:
    """Places of `count` tokens chosen greedily for diversity (DivPrune, arXiv 2503.02175), in order of place.

    The distance is 1 - cosine. The first token is the one whose nearest other token is farthest; each further one has
    the largest distance to the nearest of those chosen. Of equal ones the earlier token is taken. A token is never
    chosen twice, as the authors' program does where all remaining tokens are copies of chosen ones.

    Args:
        first: Places that are chosen at the start, in order of place.
        never: Places that are chosen only if nothing else is left, and are no one's nearest token before that.
    """
    distance = distances(features)
    chosen: list[int] = sorted(first)[:count]
    rare = np.zeros(len(features), dtype=bool)
    rare[list(never)] = True
    open_ = ~rare
    open_[chosen] = False
    if not chosen and count and open_.any():
        chosen.append(_loneliest(distance, open_))
    while len(chosen) < count:
        left = open_.copy()
        left[chosen] = False
        if not left.any():
            left = np.ones(len(features), dtype=bool)
            left[chosen] = False
        near = distance[:, chosen].min(1) if chosen else np.zeros(len(features))
        chosen.append(int(np.where(left, near, -np.inf).argmax()))
    return np.sort(np.array(chosen, dtype=np.int64))


def _loneliest(distance: Float[np.ndarray, "token token"], among: Bool[np.ndarray, " token"]) -> int:
    """The token whose nearest other one is farthest, both among the given ones."""
    places = np.flatnonzero(among)
    if len(places) == 1:
        return int(places[0])
    inner = distance[np.ix_(places, places)].copy()
    np.fill_diagonal(inner, np.inf)
    return int(places[inner.min(1).argmax()])


def distances(features: Float[np.ndarray, "token dim"]) -> Float[np.ndarray, "token token"]:
    """1 - cosine of all pairs, in double precision and rounded to 1e-12, so that copies are equally far from others."""
    wide = features.astype(np.float64)
    unit = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    return np.round(1.0 - unit @ unit.T, 12)
