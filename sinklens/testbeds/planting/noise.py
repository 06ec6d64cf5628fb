"""Content-dependent attention of a chosen size, so that a detector has something to be wrong about."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ..blocks import Layer
from .probe import Ids, eager, outputs_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def logit_spread(
    weights: Float[Tensor, "prompt head query key"], first_query: int = 8
) -> Float[Tensor, " head"]:
    """Standard deviation of the attention logits within a row, in nats, from causal weights.

    The log of a row's weights is its logits up to a constant, which a deviation within the row does not see.
    """
    length = weights.shape[-1]
    visible = torch.ones(length, length, dtype=torch.bool, device=weights.device).tril()
    logits = weights.float().clamp_min(1e-30).log()
    count = visible.sum(-1)
    mean = (logits * visible).sum(-1) / count
    variance = ((logits - mean[..., None]).square() * visible).sum(-1) / count
    return variance[:, :, first_query:].mean((0, 2)).sqrt()


def level_logits(model: PreTrainedModel, layer: Layer, ids: Ids, noise: float) -> None:
    """Scales the block's queries so that every head's logits deviate by `noise` nats on these tokens.

    With query norms a scale of the projection would be undone, so their common gain is scaled: right on
        average
    over the block's heads.
    """
    with eager(model):
        spread = logit_spread(outputs_of(model, layer.attention, ids)[1])
    if layer.query_norm is not None:
        layer.query_norm.mul_(noise / float(spread.square().mean().sqrt()))
        return
    for head in range(layer.heads):
        rows = layer.query.rows(layer.rows(head))
        factor = noise / float(spread[head])
        rows.weight.mul_(factor)
        if rows.bias is not None:
            rows.bias.mul_(factor)
