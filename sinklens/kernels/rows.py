"""Attention weights of chosen query rows, a block at a time: for reductions that no statistic of the kernels gives."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .edits import edited
from .scores import HIDDEN, Scores
from .shapes import sizes_of
from .spec import AttentionCall, BlockPlan, Want


def weights_of_rows(
    call: AttentionCall, start: int, stop: int, plan: BlockPlan | None = None
) -> Iterator[tuple[slice, Float[Tensor, "batch head row key"], Bool[Tensor, "batch head row key"]]]:
    """The weights of query rows `start` to `stop`, a few rows of all heads at a time, with the keys those rows see.

    Learned sinks take their part, and weights are those after the call's edits. A block is overwritten by the next
    one. Memory is that of one block: about `plan.scores` numbers, or one row of all heads where that is more.
    """
    plan = plan or BlockPlan()
    sizes = sizes_of(call, Want(frozenset()))
    scores = Scores(call, plan)
    step = max(1, plan.scores // max(1, sizes.batch * sizes.heads * sizes.keys))
    for first in range(start, stop, step):
        rows = slice(first, min(first + step, stop))
        logits = scores.block(rows, slice(0, sizes.keys))
        seen = logits > HIDDEN / 2
        norm = torch.logsumexp(logits, -1)
        if call.learned_sinks is not None:
            norm = torch.logaddexp(norm, call.learned_sinks.float()[:, None])
        weights = torch.exp(logits - norm[..., None]).masked_fill_(~seen, 0.0)
        if call.edits:
            weights, _ = edited(weights, weights[..., 0], call.edits, rows, slice(0, sizes.keys))
        yield rows, weights, seen


def runs(places: list[int]) -> list[tuple[int, int]]:
    """Ranges `[first, last + 1)` of consecutive numbers in an ascending list."""
    found: list[tuple[int, int]] = []
    for place in places:
        if found and found[-1][1] == place:
            found[-1] = (found[-1][0], place + 1)
        else:
            found.append((place, place + 1))
    return found
