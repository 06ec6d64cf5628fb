"""Perplexity over a long text with a cache of bounded size: does it matter that the first tokens stay?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from sinklens.core.errors import UsageError
from sinklens.models.spec import OpenedModel
from sinklens.models.streaming_cache import streaming_cache


def streaming_losses(
    opened: OpenedModel,
    ids: Sequence[int],
    *,
    start: int = 4,
    recent: int = 508,
    chunk: int = 1,
    original_positions: bool = False,
) -> list[float]:
    """Loss in nats of every token but the first, read `chunk` tokens at a time through a streaming cache.

    Raises:
        UsageError: Fewer than two tokens, or chunks longer than `recent`.
        ModelError: The model takes no streaming cache.
    """
    if len(ids) < 2 or not 1 <= chunk <= recent:
        raise UsageError(
            f"Needed are two tokens and a chunk from 1 to recent ({recent}), got {len(ids)} and {chunk}."
        )
    row = torch.tensor([list(ids)], device=next(opened.module.parameters()).device)
    losses: list[float] = []
    settings = {"start": start, "recent": recent, "original_positions": original_positions}
    with torch.no_grad(), streaming_cache(opened, **settings) as stream:
        for at in range(0, len(ids) - 1, chunk):
            part = row[:, at : min(at + chunk, len(ids) - 1)]
            logits = opened.module(part, past_key_values=stream.past_key_values, use_cache=True).logits[0]
            after = row[0, at + 1 : at + 1 + part.shape[1]]
            losses += torch.nn.functional.cross_entropy(logits.float(), after, reduction="none").tolist()
    return losses


def streaming_comparison(
    opened: OpenedModel, ids: Sequence[int], *, start: int = 4, recent: int = 508, chunk: int = 1
) -> dict[str, Any]:
    """The same text read with the first tokens kept, dropped, with nothing dropped, and with wrong positions.

    The cache is as large with the first tokens as without them (`start + recent`).

    Returns:
        Plain JSON: settings, and perplexity per condition over all tokens (`perplexity`) and over those read after
        the cache was first full (`after_full`; None if it never was).
    """
    size = start + recent
    conditions: dict[str, dict[str, Any]] = {
        "kept": {"start": start, "recent": recent},
        "dropped": {"start": 0, "recent": size},
        "full": {"start": 0, "recent": max(size, len(ids))},
        "original_positions": {"start": start, "recent": recent, "original_positions": True},
    }
    found: dict[str, Any] = {"start": start, "recent": recent, "chunk": chunk, "tokens": len(ids) - 1}
    for name, settings in conditions.items():
        losses = streaming_losses(opened, ids, **settings, chunk=chunk)
        found[name] = {"perplexity": _perplexity(losses), "after_full": _perplexity(losses[size:])}
    return found


def _perplexity(losses: Sequence[float]) -> float | None:
    return math.exp(math.fsum(losses) / len(losses)) if losses else None
