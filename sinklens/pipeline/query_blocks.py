"""How many query rows the statistics take at once: from the processor's cache and the memory there is."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from sinklens.kernels.shapes import Sizes
from sinklens.kernels.spec import BlockPlan
from sinklens.kernels.walk import row_blocks
from sinklens.models.spec import Tower

from .cost import available_memory

BYTES = 4
LEAST_SCORES = 400_000
"""Below this a block is so small that walking costs more than computing."""
COPIES = 4
"""Buffers of the size of a block that are held at once: logits, weights, and scratch of products and sums."""
SHARE = 0.05
"""Largest part of the free memory that blocks may take."""
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def fitting_blocks(plan: BlockPlan, *, cache: int | None = None, memory: int | None = None) -> BlockPlan:
    """The plan with fewer logits in flight where the cache, or a small part of the memory, holds fewer.

    Args:
        plan: Its `scores` are what was fastest where there is room for them.
        cache, memory: Bytes of the last-level cache and of free memory; None asks the machine.
    """
    cache = last_cache() if cache is None else cache
    memory = available_memory() if memory is None else memory
    scores = plan.scores
    if cache is not None:
        scores = min(scores, cache // BYTES)
    if memory is not None:
        scores = min(scores, int(SHARE * memory) // (BYTES * COPIES))
    return replace(plan, scores=max(LEAST_SCORES, scores))


def last_cache() -> int | None:
    """Bytes of the largest cache of a core, None where the system does not tell it."""
    found = [_bytes(path.read_text()) for path in CACHES.glob("index*/size") if os.access(path, os.R_OK)]
    return max(found, default=0) or None


def _bytes(text: str) -> int:
    number, unit = text.strip()[:-1], text.strip()[-1:].upper()
    factors = {"K": 1024, "M": 1024**2, "G": 1024**3}
    return int(number) * factors[unit] if unit in factors and number.isdigit() else 0


def described_blocks(tower: Tower, plan: BlockPlan, length: int) -> dict[str, Any]:
    """For plan and manifest: logits in flight, and query rows per block for one prompt of this length."""
    heads, kv_heads = max(1, tower.heads), max(1, tower.kv_heads)
    sizes = Sizes(1, heads, kv_heads, heads // kv_heads, length, length, 1, 1, 0)
    rows = row_blocks(sizes, plan)[0][1]
    return {"scores": plan.scores, "rows": rows, "at_tokens": length, "cache_bytes": last_cache()}
