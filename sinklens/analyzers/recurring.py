"""Directions that come back in picture after picture: the first stage of telling sink, dead and alive tokens apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

POOL = 50_000
"""Vectors that are looked at, at most."""


@dataclass(frozen=True)
class Recurring:
    """A cluster of nearly equal directions.

    Attributes:
        centroid: Unit mean of the members.
        frequency: Share of the pictures that have a member.
        tightness: Mean cosine of two different members.
        members: Per picture, the places of its members.
    """

    centroid: Float[np.ndarray, " dim"]
    frequency: float
    tightness: float
    members: tuple[Int[np.ndarray, " member"], ...]

    @property
    def size(self) -> int:
        return sum(len(places) for places in self.members)


def recurring_directions(
    pictures: Sequence[Float[np.ndarray, "token dim"]], *, join: float, frequency: float, tightness: float
) -> list[Recurring]:
    """Clusters around leaders that most pictures have a member of, most frequent first.

    A leader is a token that is not within `join` (cosine) of an earlier leader. A cluster that is missing from at most
    a share `1 - frequency` of the pictures has a member in any larger part of them, so leaders are sought in the first
    pictures only, and dropped once too many pictures lack them. Clusters whose centroids come within `join` of a
    larger one are part of that one.

    Args:
        pictures: Unit vectors of each picture's tokens.
        join: Least cosine of a member with its leader.
        frequency: Least share of pictures with a member.
        tightness: Least mean cosine of two members.
    """
    units = [_unit(picture) for picture in pictures]
    allowed = max(0, len(units) - int(np.ceil(frequency * len(units) - 1e-9)))
    leaders = _leaders(units[: allowed + 1], join)
    missing = np.zeros(len(leaders), dtype=int)
    for unit in units:
        missing += (leaders @ unit.T).max(1, initial=-1.0) < join
        leaders, missing = leaders[missing <= allowed], missing[missing <= allowed]
    found = [_cluster(leader, units, join) for leader in leaders]
    found = [
        cluster for cluster in found if cluster.frequency >= frequency and cluster.tightness >= tightness
    ]
    found.sort(key=lambda cluster: (-cluster.size, -cluster.frequency))
    kept: list[Recurring] = []
    for cluster in found:
        if all(cluster.centroid @ other.centroid < join for other in kept):
            kept.append(cluster)
    return kept


def _unit(vectors: np.ndarray) -> Float[np.ndarray, "token dim"]:
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)


def _leaders(pictures: Sequence[np.ndarray], join: float) -> Float[np.ndarray, "leader dim"]:
    """In order, every token that no leader before it is close to."""
    chosen = np.zeros((0, pictures[0].shape[1] if pictures else 0), dtype=np.float32)
    for picture in pictures:
        left = picture[(picture @ chosen.T).max(1, initial=-1.0) < join]
        while len(left):
            chosen = np.concatenate([chosen, left[:1]])
            left = left[left @ left[0] < join]
    return chosen


def _cluster(leader: np.ndarray, units: Sequence[np.ndarray], join: float) -> Recurring:
    members = tuple(np.flatnonzero(unit @ leader >= join) for unit in units)
    vectors = np.concatenate([unit[places] for unit, places in zip(units, members, strict=True)]).astype(
        np.float64
    )
    n, total = len(vectors), vectors.sum(0)
    size = float(np.linalg.norm(total))
    # The squared sum holds every ordered pair and each vector with itself.
    tightness = (size**2 - n) / (n * (n - 1)) if n > 1 else 1.0
    share = sum(len(places) > 0 for places in members) / len(units)
    return Recurring(total / max(size, 1e-30), share, tightness, members)


def nearest_direction(
    vectors: Float[np.ndarray, "token dim"], centroids: Float[np.ndarray, "cluster dim"], near: float
) -> tuple[Int[np.ndarray, " token"], Float[np.ndarray, " token"]]:
    """The cluster whose centroid is nearest to each token, -1 below `near`, and the cosine."""
    if not len(centroids):
        return np.full(len(vectors), -1), np.full(len(vectors), np.nan)
    cosine = _unit(vectors) @ centroids.T.astype(np.float32)
    best = cosine.argmax(1)
    value = cosine[np.arange(len(best)), best]
    return np.where(value >= near, best, -1), value
