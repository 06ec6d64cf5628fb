"""Sink heads: a key that is a number at the target and 0 elsewhere, a query that is equal for all tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..blocks import Layer, rotary_slot
from .bed import Bed
from .probe import outputs_of
from .truth import PlantedHead, PlantedMassive

NORMED_KEY_GAIN = 100.0
"""With key norms: how far the planted component outweighs the rest of the target's key."""

NORMED_QUERY_SIZE = 10.0
"""With query norms: the query before its norm, far above the norm's epsilon."""


def plant_heads(
    bed: Bed, layer: Layer, heads: list[PlantedHead], massive: tuple[PlantedMassive, ...], keep_content: bool
) -> list[PlantedHead]:
    """Plants one block's heads; returns them with the distance that rotary attention allows.

    Only the slowest rotary pair of the key head is taken, so heads that share it by GQA keep their own
    attention.

    Args:
        keep_content: Planted queries keep their other components, which then add noise to the logits.
    """
    states = outputs_of(bed.model, layer.pre_attention.module, bed.ids)
    slots, frequency = rotary_slot(bed.model, layer)
    groups = {layer.kv_of(head.head) for head in heads}
    for other in set(range(layer.heads)) - {head.head for head in heads}:
        if layer.kv_of(other) in groups or layer.query_norm is not None:
            layer.query.rows(layer.rows(other)).clear(slots)
    for head in heads:
        dim = bed.flags[head.target]
        if head.via == "massive":
            dim = next(i.dim for i in massive if i.target == head.target and i.lives_at(layer.index))
        _plant_key(bed, layer, head, dim, states, slots)
        _plant_query(bed, layer, head, states, slots, keep_content and layer.query_norm is None)
    reach = math.floor(math.acos(0.9) / frequency) if frequency else None
    return [replace(head, reach=reach) for head in heads]


def _plant_key(
    bed: Bed,
    layer: Layer,
    head: PlantedHead,
    dim: int,
    states: Float[Tensor, "prompt position dim"],
    slots: list[int],
) -> None:
    """The key's first slot becomes 1 at the target. Under a key norm it becomes all of the key there."""
    key = layer.key.rows(layer.rows(layer.kv_of(head.head)))
    key.clear(slots)
    gain = 1.0
    if layer.key_norm is not None:
        content = nn.functional.linear(states[bed.where(head.target)], key.weight)
        gain = max(1.0, NORMED_KEY_GAIN * float(content.float().norm(dim=-1).max()))
    bed.look(key.weight[slots[0]], dim, gain / bed.mean_reading(states, dim, head.target))


def _plant_query(
    bed: Bed,
    layer: Layer,
    head: PlantedHead,
    states: Float[Tensor, "prompt position dim"],
    slots: list[int],
    keep_content: bool,
) -> None:
    """The query's first slot gives the logit: by its bias if it has one, else by the constant dim.

    Without bias and query norm the constant is seen through the block's norm, so the logit varies with the
    size of the token's state; `strength` is its mean over ordinary calibration tokens.
    """
    query = layer.query.rows(layer.rows(head.head))
    query.clear(slots if keep_content else slice(None))
    raw = head.strength
    if layer.softcap is not None:
        raw = layer.softcap * math.atanh(head.strength / layer.softcap)
    if bed.constant is None:
        assert query.bias is not None
        query.bias[slots[0]] = raw / layer.scale
        return
    seen = float(states[..., bed.constant][bed.ordinary].float().mean())
    if layer.query_norm is None or layer.key_norm is None:
        query.weight[slots[0], bed.constant] = raw / (layer.scale * seen)
        return
    query.weight[slots[0], bed.constant] = NORMED_QUERY_SIZE / seen
    if torch.abs(layer.key_norm[slots[0]]) < 0.1:
        layer.key_norm[slots[0]] = 1.0
    # After both norms each vector has the one component sqrt(head_dim) times its gain.
    layer.query_norm[slots[0]] = raw / (layer.scale * layer.head_dim * float(layer.key_norm[slots[0]]))
