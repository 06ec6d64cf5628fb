"""Signals of how a prompt is read: probe queries, distances of local heads (WAAD), influence on later tokens (FAI).

WAAD and FAI (Preplan-and-Anchor, arXiv 2510.13554) average over the heads that look back least and farthest, which
is known only when all blocks have run. Until then one number per head and position is kept, and dropped at the end.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinklens.kernels.shapes import four_axes, visible_of
from sinklens.kernels.spec import LEAST_LEFT, AttentionCall, Stat, Want, part_left

from . import signals as sig
from .ledger import Arrays, Ledger
from .prompt_view import PromptView

HEAD_SHARE = 0.3
PROBE_SHARE = 0.05
_SEED = 0

NEAR, BAND, LOOK_BACK = "_near", "_band", "_look_back"
"""Arrays of a record that the join replaces by signals."""


class ReadingRecorder:
    """Collects what one batch shows of the reading signals."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._probes: dict[tuple[int, int], Bool[Tensor, "batch query"]] = {}

    def probes(self, call: AttentionCall) -> Bool[Tensor, "batch query"]:
        """The probe queries of every prompt, where they are in the padded rows of this call."""
        queries, keys = call.query.shape[2], call.key.shape[2]
        if (queries, keys) not in self._probes:
            marks = torch.zeros(call.query.shape[0], keys, dtype=torch.bool, device=call.query.device)
            for row, places in enumerate(self.ledger.places(keys, call.query.device)):
                marks[row, places[probe_positions(len(places)).to(places.device)]] = True
            self._probes[queries, keys] = marks[:, keys - queries :]
        return self._probes[queries, keys]

    def on_prompt(self, view: PromptView) -> None:
        wanted, put = self.ledger.wanted, self.ledger.put
        if view.has(Stat.RECEIVED_ROWS):
            counts = probes_that_see(view, probe_positions(view.length))
            share = (view.of(Stat.RECEIVED_ROWS) / counts.clamp(min=1)).mean(0)
            counts = counts.amax(0)
            put(view.row, sig.PROBE_VISIBLE.name, view.layer, counts.to(torch.int32))
            if sig.PROBE_RECEIVED in wanted:
                share = torch.where(counts > 0, share, float("nan"))
                put(view.row, sig.PROBE_RECEIVED.name, view.layer, share)
        if wanted & {sig.LOCAL_DISTANCE, sig.FUTURE_INFLUENCE}:
            put(view.row, LOOK_BACK, view.layer, view.of(Stat.DISTANCE).mean(-1))
        if sig.LOCAL_DISTANCE in wanted:
            put(view.row, NEAR, view.layer, torch.stack(near_distances(view)))
        if sig.FUTURE_INFLUENCE in wanted:
            put(view.row, BAND, view.layer, torch.stack(band_means(view)))


def probe_positions(length: int) -> Int[Tensor, " probe"]:
    """Positions of the probe queries of a prompt, ascending: the last 5 %, and as many of the others at random.

    They depend on the length alone, so a prompt has the same ones in every batch.
    """
    count = max(1, int(PROBE_SHARE * length))
    others = torch.randperm(length - count, generator=torch.Generator().manual_seed(_SEED))[:count]
    return torch.cat([others.sort().values, torch.arange(length - count, length)])


def probes_that_see(view: PromptView, positions: Int[Tensor, " probe"]) -> Int[Tensor, "visible_head pos"]:
    """How many of the probe queries see each key."""
    call = view.call
    queries, keys = call.query.shape[2], call.key.shape[2]
    places = torch.arange(keys, device=call.query.device)[view.span]
    if call.mask is None:
        own = torch.arange(view.length, device=places.device)
        probe = positions.to(places.device)
        seen = probe[:, None] >= own if call.causal else torch.ones_like(probe[:, None] + own).bool()
        return seen.sum(0)[None]
    rows = places[positions.to(places.device)] - (keys - queries)
    mask = four_axes(call.mask, queries, keys)
    return visible_of(mask[view.row if len(mask) > 1 else 0][:, rows[rows >= 0]][..., view.span]).sum(1)


def near_distances(view: PromptView) -> tuple[Float[Tensor, "head pos"], Float[Tensor, "head pos"]]:
    """Mean distance cut at the window, per head and row; then without the first token, NaN where nothing is left."""
    near, first = view.of(Stat.DISTANCE_WINDOWED), view.of(Stat.GROUP_MASS)[..., 0]
    window = Want.window
    own = torch.arange(view.length, device=near.device).clamp(max=window)
    left = 1.0 - first
    rest = ((near - first * own) / left).clamp(0.0, window)
    rest = torch.where(left > LEAST_LEFT, rest, float("nan"))
    rest[:, :1] = float("nan")  # the first token itself has nothing else to read
    return near, rest


def band_means(view: PromptView) -> tuple[Float[Tensor, "head pos"], Float[Tensor, "head pos"]]:
    """Mean attention from the queries in the band after each key; then without the first token, rows renormalised.

    NaN where the band holds no query, and in the second where none of them leaves anything beside the first token:
    such a query has no part in the sum, so it has none in the divisor.
    """
    first, last = Want.band
    length = view.length
    parts = part_left(1.0 - view.of(Stat.GROUP_MASS)[..., 0])
    before = torch.cat([torch.zeros_like(parts[:, :1]), parts.cumsum(-1)], -1)
    place = torch.arange(length, device=parts.device)
    start, stop = (place + first).clamp(max=length), (place + last + 1).clamp(max=length)
    queries, taking_part = (stop - start).to(parts.dtype), before[:, stop] - before[:, start]
    means = []
    for stat, count in ((Stat.RECEIVED_BAND, queries), (Stat.RECEIVED_BAND_REST, taking_part)):
        # Less than a hundredth of one query is the rounding of sums.
        known = count > 0.01
        means.append(torch.where(known, view.of(stat) / torch.where(known, count, 1.0), float("nan")))
    return means[0], means[1]


def join_reading(arrays: Arrays) -> None:
    """Choose the heads, average over them, and drop what was kept for it."""
    if LOOK_BACK not in arrays:
        return
    back = arrays.pop(LOOK_BACK)
    local, remote = heads_by_look_back(back)
    if NEAR in arrays:
        arrays[sig.LOCAL_DISTANCE.name] = local_distance(arrays.pop(NEAR), local)
    if BAND in arrays:
        arrays[sig.FUTURE_INFLUENCE.name] = future_influence(arrays.pop(BAND), remote)


def heads_by_look_back(
    back: Float[np.ndarray, "layer head"],
) -> tuple[Bool[np.ndarray, "layer head"], Bool[np.ndarray, "layer head"]]:
    """The 30 % of all heads (at least one) with the smallest and with the largest mean distance.

    Heads are counted over all blocks together, those of blocks without attention (NaN) left out; ties go to the
    earlier head.
    """
    flat = back.ravel()
    heads = np.flatnonzero(~np.isnan(flat))
    count = max(1, round(HEAD_SHARE * len(heads)))
    chosen = []
    for order in (flat[heads], -flat[heads]):
        mark = np.zeros(flat.shape, dtype=bool)
        mark[heads[np.argsort(order, kind="stable")[:count]]] = True
        chosen.append(mark.reshape(back.shape))
    return chosen[0], chosen[1]


def local_distance(
    near: Float[np.ndarray, "layer variant head pos"], chosen: Bool[np.ndarray, "layer head"]
) -> Float[np.ndarray, "variant pos"]:
    """WAAD; a head takes no part in a row where it reads only the first token, in the variant without it."""
    found = np.moveaxis(near, 1, 2)[chosen]
    return _mean(found)


def future_influence(
    band: Float[np.ndarray, "layer variant head pos"], chosen: Bool[np.ndarray, "layer head"]
) -> Float[np.ndarray, "variant pos"]:
    """FAI: a head takes no part at a key whose queries in the band leave nothing beside the first token."""
    found = _mean(np.moveaxis(band, 1, 2)[chosen])
    found[1, :1] = np.nan  # its own column is the one left out
    return found


def _mean(values: Float[np.ndarray, "chosen variant pos"]) -> Float[np.ndarray, "variant pos"]:
    """Mean over heads without NaN, which stays where all are."""
    known = ~np.isnan(values)
    count = known.sum(0)
    total = np.where(known, values, 0.0).sum(0, dtype=np.float64)
    return (total / np.where(count > 0, count, np.nan)).astype(np.float32)
