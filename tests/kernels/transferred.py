"""Moving attention mass in a whole map: the definition that a transfer beside a kernel must equal."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.kernels.key_sets import Factors, KeySets, Rule, Shares, checked_sizes, own_columns
from sinklens.kernels.spec import AttentionCall


def transferred_weights(
    weights: Float[Tensor, "batch head query key"],
    call: AttentionCall,
    sets: KeySets,
    rule: Rule,
    rows: Bool[Tensor, "batch query"] | None = None,
) -> Float[Tensor, "batch head query key"]:
    """The edited map itself."""
    sizes = checked_sizes(call, None, sets, rows)
    wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
    columns = torch.where(sets.valid, sets.columns, 0).flatten(2).expand(-1, sizes.heads, -1)[:, :, None]
    there = sets.valid.flatten(2)[:, :, None]
    if sets.keep_own:
        there = there & (columns != own_columns(sets, sizes, weights.device)[:, None])
    columns = columns.expand(-1, -1, sizes.queries, -1)
    picked = torch.where(there, wide.gather(3, columns), 0.0)
    total = wide.sum(-1)
    rest = wide.scatter_add(3, columns, -picked).sum(-1)
    learned = (1.0 - total).clamp(min=0.0) if call.learned_sinks is not None else torch.zeros_like(total)
    picked = picked.unflatten(-1, tuple(sets.columns.shape[2:]))
    found = rule(Shares(picked.sum(-1), rest, learned))
    assert isinstance(found, Factors)  # gains on logits have a definition of their own
    edited = (found.edited & (total > 0))[..., None]
    edited = edited if rows is None else edited & rows[:, None, :, None]
    divisor = found.divisor[..., None]
    added = (picked * (found.factors - 1.0)[..., None]).flatten(3) / divisor
    return torch.where(edited, (wide / divisor).scatter_add(3, columns, added), wide).to(weights.dtype)
