"""The sizes of one attention call, checked once so that the kernels need not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import UsageError
from .spec import AttentionCall, Stat, Want

NEED_GROUPS = frozenset({Stat.GROUP_MASS, Stat.GROUP_OUTPUT, Stat.RECEIVED_BAND_REST})


@dataclass(frozen=True)
class Sizes:
    """Sizes of an `AttentionCall`; `group` query heads share a key head, row `q` is at key `q + offset`."""

    batch: int
    heads: int
    kv_heads: int
    group: int
    queries: int
    keys: int
    dim: int
    value_dim: int
    offset: int


def sizes_of(call: AttentionCall, want: Want) -> Sizes:
    """Sizes of the call.

    Raises:
        UsageError: Empty tensors, or shapes that do not fit together; all misfits are named at once.
    """
    batch, heads, queries, dim = call.query.shape
    # Values may be 0 wide: who knows the weights already asks for statistics alone (`tracers/fallback.py`).
    if not (call.query.numel() and call.key.numel()) or 0 in call.value.shape[:3]:
        raise UsageError(
            "This attention call is empty: it has no query, no key or no value.",
            detail=", ".join(
                f"{name} is {tuple(getattr(call, name).shape)}" for name in ("query", "key", "value")
            ),
            hint="Leave out empty prompts and empty batches.",
        )
    kv_heads, keys = call.key.shape[1:3]
    value_dim = call.value.shape[3]
    expected = {
        "key": (call.key, (batch, kv_heads, keys, dim)),
        "value": (call.value, (batch, kv_heads, keys, value_dim)),
        "counted": (call.counted, (batch, queries)),
        "learned_sinks": (call.learned_sinks, (heads,)),
    }
    wrong = [
        f"{name} is {tuple(tensor.shape)}, expected {shape}"
        for name, (tensor, shape) in expected.items()
        if tensor is not None and tuple(tensor.shape) != shape
    ]
    if heads % kv_heads:
        wrong.append(f"{heads} query heads cannot share {kv_heads} key heads")
    wrong += _mask_misfits(call.mask, (batch, heads, queries, keys))
    wrong += _group_misfits(want, batch, heads, keys) + _probe_misfits(want, batch, queries)
    if wrong:
        query = f"query is (batch head query dim) = {tuple(call.query.shape)}"
        raise UsageError(
            "The tensors of this attention call do not fit together.", detail=f"{query}; {'; '.join(wrong)}."
        )
    return Sizes(batch, heads, kv_heads, heads // kv_heads, queries, keys, dim, value_dim, keys - queries)


def _mask_misfits(mask: Tensor | None, full: tuple[int, int, int, int]) -> list[str]:
    if mask is None:
        return []
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if len(shape) == 4 and all(size in (1, limit) for size, limit in zip(shape, full, strict=True)):
        return []
    return [f"mask is {tuple(mask.shape)}, expected to broadcast to (batch head query key) = {full}"]


def _probe_misfits(want: Want, batch: int, queries: int) -> list[str]:
    if Stat.RECEIVED_ROWS not in want.stats:
        return []
    if want.probes is None:
        return ["RECEIVED_ROWS needs `probes`"]
    if tuple(want.probes.shape) == (batch, queries):
        return []
    return [f"probes is {tuple(want.probes.shape)}, expected {(batch, queries)}"]


def _group_misfits(want: Want, batch: int, heads: int, keys: int) -> list[str]:
    if not want.stats & NEED_GROUPS:
        return []
    if want.groups is None:
        return ["GROUP_MASS, GROUP_OUTPUT and RECEIVED_BAND_REST need `groups`"]
    if Stat.RECEIVED_BAND_REST in want.stats and not want.groups.shape[0]:
        return ["RECEIVED_BAND_REST needs at least one group"]
    if tuple(want.groups.shape[1:]) in {(batch, keys), (batch, heads, keys)}:
        return []
    return [f"groups is {tuple(want.groups.shape)}, expected (group, {batch}[, {heads}], {keys})"]


def four_axes(mask: Tensor, queries: int, keys: int) -> Tensor:
    """The mask as a view `[1|batch, 1|head, query, key]`."""
    mask = mask[(None,) * (4 - mask.ndim)]
    return mask.expand(mask.shape[0], mask.shape[1], queries, keys)


def visible_of(mask: Tensor) -> Tensor:
    """Where a mask lets a key through: True if boolean, above half the lowest number if additive.

    "Half the lowest" because masks are summed and cast on their way: the value for "hidden" is `finfo.min`,
    `-inf`, or near them, while a bias that is meant as a bias (ALiBi) is nowhere near.
    """
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
