"""Attention of a model whose heads are spread over processes: each measures its own, and all of them see the whole.

The map itself, which grows with the square of the length, stays where it is. Queries, keys, values and statistics of
one block, which grow with the length, are joined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from sinklens.core.errors import ModelError
from sinklens.kernels.spec import AttentionCall, AttentionStatistics, Stat
from sinklens.models.spec import Tower
from sinklens.models.spread import Spread

Whole = Callable[[AttentionCall, AttentionStatistics], tuple[AttentionCall, AttentionStatistics]]


def whole_heads(spread: Spread | None, tower: Tower) -> Whole | None:
    """What joins the heads of a call and of its statistics; None where a process has them all.

    Heads are joined in order of rank, as the plan cut the projections. Must be called by all processes.
    """
    if spread is None:
        return None
    over = spread

    def join(
        call: AttentionCall, statistics: AttentionStatistics
    ) -> tuple[AttentionCall, AttentionStatistics]:
        own, kv = call.query.shape[1], call.key.shape[1]
        if own == tower.heads:  # the plan gathers them before the attention
            return call, statistics
        if own * over.size != tower.heads or own % kv or (mask_heads(call) not in (1, own)):
            raise ModelError(
                f"{over!r} sees {own} heads with {kv} keys each, of {tower.heads} heads in all.".capitalize(),
                detail="Expected equal shares, in order of rank.",
                hint="Spread the layers instead: device_map='auto'.",
            )

        def by_head(values: Tensor, heads: int = own) -> Tensor:
            return over.joined(values, 1, heads * over.size)

        def every(values: dict[Stat, Tensor]) -> dict[Stat, Tensor]:
            # In the same order everywhere; that of a set differs between processes.
            return {stat: by_head(values[stat]) for stat in sorted(values)}

        # One key for all heads is held by every process.
        shared = kv == tower.kv_heads == 1
        sinks, visible, mask = call.learned_sinks, statistics.visible, call.mask
        whole = replace(
            call,
            query=by_head(call.query),
            key=call.key if shared else by_head(call.key, kv),
            value=call.value if shared else by_head(call.value, kv),
            learned_sinks=None if sinks is None else over.joined(sinks, 0, tower.heads),
            mask=by_head(mask) if mask is not None and mask_heads(call) > 1 else mask,
        )
        return whole, replace(
            statistics,
            values=every(statistics.values),
            variances=every(statistics.variances),
            visible=by_head(visible) if visible is not None and mask_heads(call) > 1 else visible,
        )

    return join


def mask_heads(call: AttentionCall) -> int:
    """Heads for which the mask of a call differs, 1 if it is the same for all."""
    return 1 if call.mask is None or call.mask.ndim < 4 else call.mask.shape[1]
