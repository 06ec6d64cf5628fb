"""Perplexity over a long text with a cache of bounded size: does it matter that the first tokens stay?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from sinklens.core.errors import UsageError
from sinklens.models.spec import OpenedModel
from sinklens.models.streaming_cache import streaming_cache

from .paired import paired_difference

Progress = Callable[[int, int], None]
CONDITIONS = {
    "kept": "first tokens kept",
    "dropped": "first tokens dropped",
    "full": "nothing dropped",
    "original_positions": "first tokens kept, positions of the text",
}
"""How the text is read, and what each way is called."""
BLOCK, FEW = 64, 4
"""Differences are compared within texts; of fewer than 4 texts, within blocks of 64 tokens, since losses of neighbours
are not independent."""

Texts = Int[np.ndarray, "text token"]


def streaming_losses(
    opened: OpenedModel,
    ids: Texts | Sequence[int],
    *,
    start: int = 4,
    recent: int = 508,
    chunk: int = 1,
    original_positions: bool = False,
    progress: Progress | None = None,
) -> Float[np.ndarray, "text token"]:
    """Loss in nats of every token but the first, read `chunk` tokens at a time through a streaming cache.

    Args:
        ids: One text, or several of one length, which are read side by side.

    Raises:
        UsageError: Fewer than two tokens, or chunks longer than `recent`.
        ModelError: The model takes no streaming cache.
    """
    rows = torch.as_tensor(np.atleast_2d(np.asarray(ids)), device=next(opened.module.parameters()).device)
    last = rows.shape[1] - 1
    if last < 1 or not 1 <= chunk <= recent:
        raise UsageError(
            f"Needed are two tokens and a chunk from 1 to recent ({recent}), got {last + 1} and {chunk}."
        )
    losses: list[np.ndarray] = []
    settings = {"start": start, "recent": recent, "original_positions": original_positions}
    with torch.no_grad(), streaming_cache(opened, **settings) as stream:
        for at in range(0, last, chunk):
            part = rows[:, at : min(at + chunk, last)]
            logits = opened.module(part, past_key_values=stream.past_key_values, use_cache=True).logits
            after = rows[:, at + 1 : at + 1 + part.shape[1]]
            found = torch.nn.functional.cross_entropy(logits.float().mT, after, reduction="none")
            losses.append(found.double().cpu().numpy())
            if progress:
                progress(at + part.shape[1], last)
    return np.concatenate(losses, 1)


def streaming_comparison(
    opened: OpenedModel,
    ids: Texts | Sequence[int],
    *,
    start: int = 4,
    recent: int = 508,
    chunk: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The same texts read with the first tokens kept, dropped, with nothing dropped, and with wrong positions.

    The cache is as large with the first tokens as without them (`start + recent`).

    Returns:
        Plain JSON: settings, and per condition the perplexity over all tokens (`perplexity`) and over those read after
        the cache was first full (`after_full`; None if it never was). `added`: loss over that of `kept`, of the
        tokens after the cache was full, nats per token, with a paired 95 % t interval over `n` texts, or over blocks
        of 64 tokens where there are fewer than 4 texts (`unit`); None for `kept` itself.
    """
    size, rows = start + recent, np.atleast_2d(np.asarray(ids))
    texts, last = len(rows), rows.shape[1] - 1
    settings: dict[str, dict[str, Any]] = {
        "kept": {"start": start, "recent": recent},
        "dropped": {"start": 0, "recent": size},
        "full": {"start": 0, "recent": max(size, last + 1)},
        "original_positions": {"start": start, "recent": recent, "original_positions": True},
    }
    losses = {}
    for place, name in enumerate(CONDITIONS):

        def told(done: int, all_: int, before: int = place) -> None:
            if progress:
                progress(before * all_ + done, len(CONDITIONS) * all_)

        losses[name] = streaming_losses(opened, rows, **settings[name], chunk=chunk, progress=told)
    found: dict[str, Any] = {"start": start, "recent": recent, "chunk": chunk, "texts": texts, "tokens": last}
    found["unit"] = "text" if texts >= FEW else f"block of {BLOCK} tokens"
    kept = _units(losses["kept"][:, size:])
    for name, each in losses.items():
        found[name] = {
            "perplexity": _perplexity(each),
            "after_full": _perplexity(each[:, size:]),
            "added": None if name == "kept" else paired_difference(_units(each[:, size:]), kept).to_json(),
        }
    return found


def _units(losses: Float[np.ndarray, "text token"]) -> Float[np.ndarray, " unit"]:
    """Mean loss per text, or per block; what is left over at the end of a text is no block."""
    if losses.shape[1] == 0:
        return np.empty(0)
    if len(losses) >= FEW:
        return losses.mean(1)
    whole = losses.shape[1] - losses.shape[1] % BLOCK
    return losses[:, :whole].reshape(-1, BLOCK).mean(1)


def _perplexity(losses: Float[np.ndarray, "text token"]) -> float | None:
    return math.exp(math.fsum(losses.ravel()) / losses.size) if losses.size else None
