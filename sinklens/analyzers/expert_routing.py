"""What each expert adds to one entry of the residual stream, and how the router treats the token it belongs to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord, Trace

from .spikes import Spike


@dataclass(frozen=True)
class Routing:
    """How the router treats the sink token and all other tokens, means over prompts; NaN where not recorded.

    Attributes:
        score, others: Router score before the choice, at the sink token and over the other tokens.
        chosen: Share of prompts that route the sink token to the expert.
        chosen_others: How often the other tokens choose it.
        weight: Routing weight of the sink token where it is routed to the expert.
    """

    score: Float[np.ndarray, "layer expert"]
    others: Float[np.ndarray, "layer expert"]
    chosen: Float[np.ndarray, "layer expert"]
    chosen_others: Float[np.ndarray, "layer expert"]
    weight: Float[np.ndarray, "layer expert"]


def contributions(spike: Spike) -> Float[np.ndarray, "prompt layer expert"]:
    """What each expert adds to the entry over the entry's peak, prompt by prompt; NaN where not known.

    Known are experts looked up at the entry, those whose largest output of the prompt lies on it, and those the token
    is not routed to, which add nothing.
    """
    shape = spike.paths[0].record[sig.EXPERT_MAX].shape
    out = np.full((len(spike.paths), *shape), np.nan)
    for share, path in zip(out, spike.paths, strict=True):
        record = path.record
        weight = _weights_at(record, path.position, shape)
        share[~np.isnan(weight).all(1, keepdims=True) & np.isnan(weight)] = 0.0
        here = (record["expert_max_pos"] == path.position) & (record["expert_max_dim"] == path.dim)
        here &= ~np.isnan(weight)
        share[here] = (record[sig.EXPERT_MAX] * weight)[here] / path.peak
        looked_up = np.flatnonzero(path.expert >= 0)
        share[looked_up, path.expert[looked_up]] = path.expert_value[looked_up] / path.peak
    return out


def routing_at(trace: Trace, position: int) -> Routing:
    """Router scores and choices at a position against the others, over the prompts that have it."""
    records = [record for record in trace if len(record) > position]
    shape = records[0][sig.EXPERT_MAX].shape
    scores, chosen, weights = [], [], []
    for record in records:
        scores.append(_score_at(record, position, shape))
        weight = _weights_at(record, position, shape)
        known = ~np.isnan(weight).all(1, keepdims=True)
        chosen.append(np.where(known, ~np.isnan(weight), np.nan))
        weights.append(weight)
    return Routing(
        mean_known(np.array(scores)),
        mean_known(np.array([_read(record, sig.ROUTER_SCORE_OTHERS, shape) for record in records])),
        mean_known(np.array(chosen, dtype=float)),
        mean_known(np.array([_read(record, sig.ROUTER_FREQUENCY_OTHERS, shape) for record in records])),
        mean_known(np.array(weights)),
    )


def _score_at(
    record: PromptRecord, position: int, shape: tuple[int, ...]
) -> Float[np.ndarray, "layer expert"]:
    out = np.full(shape, np.nan)
    if not {sig.ROUTER_SCORE.name, sig.REFERENCE_POSITION.name} <= record.arrays.keys():
        return out
    for layer, slot in np.argwhere(record[sig.REFERENCE_POSITION] == position):
        out[layer] = record[sig.ROUTER_SCORE][layer, slot]
    return out


def _weights_at(
    record: PromptRecord, position: int, shape: tuple[int, ...]
) -> Float[np.ndarray, "layer expert"]:
    """Routing weight of the token at a position for each expert; NaN for experts that were not chosen."""
    out = np.full(shape, np.nan)
    if not {sig.ROUTER_CHOICE.name, sig.KEPT_POSITIONS.name} <= record.arrays.keys():
        return out
    at = np.flatnonzero(record[sig.KEPT_POSITIONS] == position)
    if not len(at):
        return out
    choice, weight = record[sig.ROUTER_CHOICE][:, at[0]], record[sig.ROUTER_WEIGHT][:, at[0]]
    for layer, slot in np.argwhere((choice >= 0) & (choice < shape[1])):
        out[layer, choice[layer, slot]] = weight[layer, slot]
    return out


def _read(
    record: PromptRecord, signal: sig.Signal, shape: tuple[int, ...]
) -> Float[np.ndarray, "layer expert"]:
    return record.arrays.get(signal.name, np.full(shape, np.nan)).astype(float)


def mean_known(values: Float[np.ndarray, "prompt *rest"]) -> Float[np.ndarray, "*rest"]:  # noqa: F821
    """Mean over prompts of what is known, NaN where nothing is."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0.0).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)


def usual_neuron(spike: Spike, prompts: np.ndarray, layer: int, expert: int) -> int | None:
    """The input of the expert's down projection that adds most to the entry, in most prompts."""
    found = []
    for path in (spike.paths[i] for i in prompts):
        record = path.record
        if path.expert[layer] == expert and path.neuron[layer] >= 0:
            found.append(int(path.neuron[layer]))
        elif sig.EXPERT_NEURON.name in record.arrays and record[sig.EXPERT_NEURON][layer, expert] >= 0:
            found.append(int(record[sig.EXPERT_NEURON][layer, expert]))
    return Counter(found).most_common(1)[0][0] if found else None
