"""The methods by their definitions: whole maps `[batch head query key]` in float64, rewritten entry by entry.

Nothing here is shared with the code under test but the tap that hands over q, k and v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sinklens.kernels.reference import dense_logits, dense_visibility
from sinklens.kernels.shapes import sizes_of
from sinklens.kernels.spec import AttentionCall, Want
from sinklens.models.anatomy import find_anatomy
from sinklens.tracers.attention import AttentionTap, Site, ignore, no_statistics
from sinklens.tracers.executor import sites

Rewrite = Callable[[Site, Tensor], Tensor]
"""Edits a map; rows of padding may be anything."""


def full_map(call: AttentionCall) -> Tensor:
    """`A` in float64; rows that see nothing are 0."""
    sizes = sizes_of(call, Want(frozenset()))
    visible = dense_visibility(call, sizes)
    logits = dense_logits(call, sizes, visible)
    if call.learned_sinks is not None:
        sink = call.learned_sinks.double()[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], -1)
    weights = torch.softmax(logits, -1)[..., : sizes.keys]
    return torch.where(visible.any(-1, keepdim=True), weights, 0.0)


def mixed(weights: Tensor, call: AttentionCall) -> Tensor:
    value = call.value.double().repeat_interleave(weights.shape[1] // call.value.shape[1], 1)
    return (weights @ value).transpose(1, 2)


@contextmanager
def rewritten(model: Any, rewrite: Rewrite, real: Tensor) -> Iterator[None]:
    """The model with every map rewritten; rows of padding keep their output."""
    tower = find_anatomy(model).main

    def edit(site: Site, call: AttentionCall, output: Tensor) -> Tensor:
        rows = real[:, -call.query.shape[2] :]
        new = mixed(rewrite(site, full_map(call)), call).to(output.dtype)
        return torch.where(rows[..., None, None], new, output)

    tap = AttentionTap(sites(model, tower, "attention"), no_statistics, ignore, edit=edit)
    with tap.attached(model):
        yield


def places(real: Tensor, position: int) -> Tensor:
    """Where a position of the own tokens stands, `[batch]`."""
    return torch.stack([row.nonzero()[position, 0] for row in real])


def scaled_map(
    weights: Tensor, at: Tensor, factor: Tensor | float, *, spare_own: bool = False, renormalise: bool = True
) -> Tensor:
    """Keys `at` `[batch, n]` times `factor` (a number, or one per head), rows back to their old sum over everything.

    The missing part of a row that does not add up to 1 is a learned sink and is divided like the rest.
    """
    batch, _, queries, keys = weights.shape
    member = torch.zeros(batch, 1, queries, keys, dtype=torch.bool)
    for row in range(batch):
        member[row, :, :, at[row]] = True
        if spare_own:
            for q in range(queries):
                member[row, :, q, q + keys - queries] = False
    factor = torch.as_tensor(factor, dtype=torch.float64).reshape(-1, 1, 1)
    changed = torch.where(member, weights * factor, weights)
    if not renormalise:
        return changed
    learned = 1.0 - weights.sum(-1, keepdim=True)
    divisor = changed.sum(-1, keepdim=True) + learned
    return torch.where(divisor > 1e-9, changed / divisor.clamp(min=1e-9), weights)


def act_sinks(weights: Tensor, real: Tensor, alpha: float, fixed: float | None = None) -> Tensor:
    """Sinks `[batch head key]` of a prompt by the paper's rule, one column at a time."""
    batch, heads, _, keys = weights.shape
    out = torch.zeros(batch, heads, keys, dtype=torch.bool)
    for b in range(batch):
        own = real[b].nonzero()[:, 0]
        limit = fixed if fixed is not None else alpha / len(own)
        for t in own[1:].tolist():
            column = weights[b, :, own, t]  # head, real query
            seen = (column > 0).any(0)
            out[b, :, t] = column.sum(1) / seen.sum() > limit
    return out


def act_map(weights: Tensor, sinks: Tensor, beta: float) -> Tensor:
    """Freed attention goes to all other keys in proportion to what they have."""
    sinks = sinks[:, :, None].expand_as(weights)
    freed = ((1 - beta) * weights * sinks).sum(-1, keepdim=True)
    others = torch.where(sinks, 0.0, weights)
    rest = others.sum(-1, keepdim=True)
    moved = torch.where(sinks, beta * weights, weights + freed * others / rest.clamp(min=1e-300))
    return torch.where(rest > 1e-6, moved, weights)
