"""Naming recurring directions, and what the classes of visual tokens have in numbers, for `visual-tokens`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sinklens.tracers import signals as sig
from sinklens.tracers import signals_pictures as pic
from sinklens.tracers.trace import PromptRecord

from .pictured import spans_of, text_received, visual_positions
from .recurring import Recurring

CLASSES = ("sink", "dead", "alive")
SINK, DEAD, ALIVE = range(3)
VIT, LLM = "of the vision tower", "of the language model"
BAND = (3, 6)
"""Blocks before which sinks of the language model are aligned with the first token."""
NEAREST = 3
"""Vocabulary tokens that the published rule looks at."""

Used = Sequence[tuple[PromptRecord, Int[np.ndarray, " place"]]]


@dataclass(frozen=True)
class Named:
    """The class of each visual token of a prompt; `kind` says which sink, and is empty for the others."""

    cls: Int[np.ndarray, " visual"]
    kind: Sequence[str]
    overlaps: int = 0


@dataclass(frozen=True)
class NamedCluster:
    """A recurring direction with what decided its class."""

    cls: int
    kind: str
    centroid: Float[np.ndarray, " dim"]
    frequency: float
    tightness: float
    size: int
    first_cosine: float
    drift: float
    received: float
    vision_norm: float | None


@dataclass(frozen=True)
class Typical:
    """Medians that dead tokens are held against."""

    drift: float
    received: float


def band_cosine(record: PromptRecord) -> Float[np.ndarray, " visual"]:
    """Largest cosine with the first token where one of the blocks 3 to 6 begins, or the later ones there are."""
    cosine = record[pic.VISUAL_FIRST_COSINE].astype(np.float64)
    first = min(BAND[0], len(cosine) - 1)
    return cosine[first : BAND[1] + 1].max(0)


def mean_drift(record: PromptRecord) -> Float[np.ndarray, " visual"]:
    """Cosine with the token's own first state, mean over the blocks after the first."""
    drift = record[pic.VISUAL_DRIFT].astype(np.float64)
    return drift[1:].mean(0) if len(drift) > 1 else drift[0]


def mean_received(record: PromptRecord) -> Float[np.ndarray, " visual"]:
    """Attention from the text after the picture, mean over layers."""
    received = text_received(record)[:, visual_positions(record)]
    known = ~np.isnan(received)
    with np.errstate(invalid="ignore"):
        return np.where(known, received, 0.0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)


def vision_ratio(record: PromptRecord) -> Float[np.ndarray, " visual"] | None:
    """Norm of each token's strongest patch after the vision tower's last block over the patches' median; None if the
    trace does not know which patches make a token."""
    if sig.VISION_NORM.name not in record.arrays or any(
        grid.members is None for grid in spans_of(record).grids
    ):
        return None
    norms = record[sig.VISION_NORM][-1].astype(np.float64)
    members = [(grid, grid.members) for grid in spans_of(record).grids]
    patches = np.unique(np.concatenate([m[m >= 0] for _, m in members if m is not None]))
    median = float(np.median(norms[patches]))
    by_position = np.full(len(record), np.nan)
    for grid, places in members:
        assert places is not None
        strongest = np.where(places >= 0, norms[np.maximum(places, 0)], -np.inf).max(-1)
        by_position[grid.positions[grid.positions >= 0]] = strongest[grid.positions >= 0]
    return by_position[visual_positions(record)] / median


def _of_members(used: Used, cluster: Recurring, values: Sequence[np.ndarray]) -> Float[np.ndarray, " member"]:
    return np.concatenate(
        [v[places[mine]] for (_, places), v, mine in zip(used, values, cluster.members, strict=True)]
    )


def typical_alive(used: Used, clusters: Sequence[Recurring]) -> Typical:
    """The median drift of all tokens, and the median attention of those in no recurring cluster."""
    drifts, received = [], []
    for i, (record, places) in enumerate(used):
        loose = np.ones(len(places), dtype=bool)
        for cluster in clusters:
            loose[cluster.members[i]] = False
        drifts.append(mean_drift(record)[places])
        received.append(mean_received(record)[places[loose]])
    alive = np.concatenate(received) if received else np.zeros(0)
    return Typical(
        float(np.median(np.concatenate(drifts))), float(np.nanmedian(alive)) if len(alive) else float("nan")
    )


def name_cluster(
    cluster: Recurring, used: Used, typical: Typical, *, first_cosine: float, vit_norm: float
) -> NamedCluster:
    """Sink, dead, or neither (left among the alive tokens)."""
    records = [record for record, _ in used]
    first = float(np.median(_of_members(used, cluster, [band_cosine(r) for r in records])))
    drift = float(np.median(_of_members(used, cluster, [mean_drift(r) for r in records])))
    received = float(np.nanmedian(_of_members(used, cluster, [mean_received(r) for r in records])))
    ratios = [vision_ratio(record) for record in records]
    known = [ratio for ratio in ratios if ratio is not None]
    vision = float(np.mean(_of_members(used, cluster, known))) if len(known) == len(records) else None
    cls, kind = ALIVE, ""
    if vision is not None and vision >= vit_norm:
        cls, kind = SINK, VIT
    elif first >= first_cosine:
        cls, kind = SINK, LLM
    elif drift >= typical.drift and received < typical.received:
        cls = DEAD
    return NamedCluster(
        cls,
        kind,
        cluster.centroid,
        cluster.frequency,
        cluster.tightness,
        cluster.size,
        first,
        drift,
        received,
        vision,
    )


def rows_by_ids(record: PromptRecord, ids: tuple[int, int, int]) -> Named:
    """The published rule: a token is of a class if the class's id is among its three nearest vocabulary tokens."""
    nearest = record[pic.LENS_ID][0, :, :NEAREST]
    hits = np.array([(nearest == token).any(1) & (token >= 0) for token in ids])
    first = np.where(hits.any(0), hits.argmax(0), -1)
    cls = np.array([(SINK, SINK, DEAD)[i] if i >= 0 else ALIVE for i in first])
    kind = [(VIT, LLM, "")[i] if i >= 0 else "" for i in first]
    return Named(cls, kind, int((hits.sum(0) > 1).sum()))


@dataclass(frozen=True)
class Values:
    """What the classes of one prompt have. The class axis is `CLASSES`; NaN where a class has no token.

    Attributes:
        share: Of the visual tokens.
        mass: Of the attention that the text puts on visual tokens, mean over layers.
        received: That attention, token by token.
    """

    share: Float[np.ndarray, " cls"]
    norm: Float[np.ndarray, " cls"]
    mass: Float[np.ndarray, " cls"]
    drift: Float[np.ndarray, "layer cls"]
    received: Float[np.ndarray, " visual"]


def class_values(record: PromptRecord, named: Named) -> Values:
    """Shares, norms, attention and drift of the classes in one prompt."""
    visual = visual_positions(record)
    member = named.cls[None] == np.arange(len(CLASSES))[:, None]
    norms, received = record[sig.EMBEDDED_NORM][visual].astype(np.float64), mean_received(record)
    by_layer = record[pic.QUERIES_RECEIVED][:, 0][:, visual].astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        mass = (by_layer @ member.T / by_layer.sum(1, keepdims=True)).T
        mean = member / member.sum(1, keepdims=True)
    drift = (
        record[pic.VISUAL_DRIFT].astype(np.float64) @ np.where(member.any(1, keepdims=True), mean, np.nan).T
    )
    return Values(
        member.mean(1),
        np.where(member.any(1), np.nan_to_num(mean) @ norms, np.nan),
        np.nanmean(mass, axis=1),
        drift,
        received,
    )


def summary_of(
    records: list[PromptRecord], found: list[Named], values: list[Values], clusters: Sequence[NamedCluster]
) -> dict[str, Any]:
    """Means over prompts, by class."""
    text = [np.delete(r[sig.EMBEDDED_NORM], visual_positions(r)).astype(np.float64).mean() for r in records]
    summary: dict[str, Any] = {
        "n_prompts": len(records),
        "n_visual": int(sum(len(named.cls) for named in found)),
        "text_norm": float(np.mean(text)),
        "overlaps": sum(named.overlaps for named in found),
        "recurring_clusters": len(clusters),
        "unnamed_clusters": sum(cluster.cls == ALIVE for cluster in clusters),
        "vit_sink_share": _kind_share(found, VIT),
        "llm_sink_share": _kind_share(found, LLM),
    }
    for index, name in enumerate(CLASSES):
        summary[f"share_{name}"] = float(np.mean([v.share[index] for v in values]))
        summary[f"attention_{name}"] = float(np.nanmean([v.mass[index] for v in values]))
        norms = [v.norm[index] for v in values if not np.isnan(v.norm[index])]
        summary[f"norm_{name}"] = float(np.mean(norms)) if norms else None
    return summary


def _kind_share(found: list[Named], kind: str) -> float:
    return float(np.mean([np.mean([k == kind for k in named.kind]) for named in found]))
