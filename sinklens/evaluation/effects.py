"""One prompt with and without a change of the model: the sink, the predictions, and what is left of the state."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sinklens.models.spec import OpenedModel
from sinklens.tracers import signals as sig
from sinklens.tracers.batch import Batch, first_tensor
from sinklens.tracers.executor import TracePlan, trace_batch
from sinklens.tracers.interventions import Acted, Intervention, position_states
from sinklens.tracers.recorder import Limits
from sinklens.tracers.states import residual_tap

from .predictions import divergence, next_token_loss

SINK_SIGNALS = frozenset(
    {sig.ATTENTION_RECEIVED, sig.ATTENTION_SELF, sig.KEPT_POSITIONS, sig.VISIBLE_QUERIES}
)
PART, STANDS_OUT = 0.1, 10.0
"""A block has a token's strong entries if they reach this part of their largest size in any block, or this multiple
of the median magnitude of the token's state there: a norm between blocks may make everything smaller."""
FAINT = 0.01
"""Heads that give the sink less than this before the change have no meaningful ratio after it."""


@dataclass(frozen=True)
class Look:
    """What is measured.

    Attributes:
        position: The sink, or None if attention is not measured.
        watched: Positions whose states are kept.
        signals: None of attention if the model's cannot be traced.
    """

    position: int | None
    watched: tuple[int, ...]
    plan: TracePlan

    @classmethod
    def at(cls, position: int | None, watched: Sequence[int], plan: TracePlan) -> Look:
        """With the attention path of `plan`, and no signals but those the sink needs."""
        light = replace(
            plan,
            signals=SINK_SIGNALS if position is not None else frozenset(),
            own_experts=False,
            limits=Limits(leading=(position or 0) + 1, strongest=0),
        )
        return cls(position, tuple(watched), light)


@dataclass(frozen=True)
class Seen:
    """One prompt in one pass.

    Attributes:
        received: Attention the sink receives, summed over its queries, `[layer, head]`, NaN without attention.
        own: The part of it that comes from its own query.
        visible: Queries that see each position, `[layer, pos]`.
        states: State of each watched position after each block.
        logits: Of the real tokens; None for a model without a language head.
        output: The model's main output at the real tokens, to see whether anything changed at all.
    """

    index: int
    received: Float[np.ndarray, "layer head"] | None
    own: Float[np.ndarray, "layer head"] | None
    visible: Float[np.ndarray, "layer pos"] | None
    states: dict[int, Float[Tensor, "layer dim"]]
    logits: Float[Tensor, "token vocab"] | None
    output: Tensor
    ids: Tensor


def look(
    opened: OpenedModel, batch: Batch, what: Look, intervention: Intervention | None = None
) -> tuple[list[Seen], Acted]:
    """One pass over a batch, changed by an intervention or not; nothing stays on the model."""
    assert batch.valid is not None
    layers = len(opened.anatomy.main.blocks)
    states: dict[tuple[int, int], dict[int, Tensor]] = {}

    def keep(layer: int, state: Tensor) -> None:
        for position in what.watched:
            for row, vector in position_states(state, batch, position):
                states.setdefault((row, position), {})[layer] = vector.detach().float().cpu()

    with ExitStack() as stack:
        acted = Acted()
        if intervention is not None:
            acted = stack.enter_context(intervention.applied(opened, batch))
        # Hooks run in the order they were put on: the state is kept as the intervention left it.
        stack.enter_context(residual_tap(opened.module, opened.anatomy.main, keep))
        run = trace_batch(opened, batch, what.plan)
    seen = []
    for row, record in enumerate(run.records):
        mine = {
            position: torch.stack([by_layer[layer] for layer in range(layers)])
            for (at, position), by_layer in states.items()
            if at == row
        }
        seen.append(_seen(record, mine, run.output, batch, row, what.position))
    return seen, acted


def _seen(
    record: Any, states: dict[int, Tensor], output: Any, batch: Batch, row: int, position: int | None
) -> Seen:
    assert batch.valid is not None
    real = batch.valid[row]
    ids = batch.inputs["input_ids"][row][real].cpu()
    main = first_tensor(output)[row]
    main = main[real.to(main.device)] if main.shape[0] == len(real) else main
    logits = getattr(output, "logits", None)
    # Classification heads have logits too: a language head has one per token of the vocabulary.
    speaks = isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[1] == len(real)
    speaks = isinstance(logits, Tensor) and speaks and logits.shape[-1] > int(ids.max())
    received, own, visible = (None, None, None) if position is None else _received(record, position)
    mine = logits[row][real.to(logits.device)] if isinstance(logits, Tensor) and speaks else None
    return Seen(record.index, received, own, visible, states, mine, main, ids)


def _received(
    record: Any, position: int
) -> tuple[Float[np.ndarray, "layer head"], Float[np.ndarray, "layer head"], Float[np.ndarray, "layer pos"]]:
    """What a position receives in all and from itself, and the queries that see each position."""
    at = int(np.flatnonzero(record[sig.KEPT_POSITIONS] == position)[0])
    visible = record[sig.VISIBLE_QUERIES].astype(np.float64)
    received = record[sig.ATTENTION_RECEIVED][:, :, at].astype(np.float64) * visible[:, position][:, None]
    return received, record[sig.ATTENTION_SELF][:, :, at].astype(np.float64), visible


def share(seen: Seen, base: Seen, position: int) -> Float[np.ndarray, "layer head"] | None:
    """Mean attention a position receives from the queries that see it in the unchanged model, itself included.

    A blocked key is seen by fewer queries; dividing by those would make nothing of the change.
    """
    if seen.received is None or base.visible is None:
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        return seen.received / base.visible[:, position][:, None]


def share_of_later(seen: Seen, base: Seen, position: int) -> Float[np.ndarray, "layer head"] | None:
    """The same from the other queries only: a position's own row is no sign of a sink."""
    if seen.received is None or seen.own is None or base.visible is None:
        return None
    others = base.visible[:, position][:, None] - 1
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(others > 0, (seen.received - seen.own) / others, np.nan)


@dataclass(frozen=True)
class Decay:
    """How much of the attention to the sink is lost, after equations 7 and 9 of arXiv 2507.23279.

    Attributes:
        by_layer: 1 minus the mean over heads of p'/p, where p (p') is the mean attention the queries after the sink
            give it before (after) the change; NaN if every head is faint.
        of_means: 1 minus the ratio of the heads' means, by layer.
        faint: Heads with p < 0.01, which are left out of `by_layer`.
    """

    by_layer: Float[np.ndarray, " layer"]
    of_means: Float[np.ndarray, " layer"]
    faint: int


def decay(before: Float[np.ndarray, "layer head"], after: Float[np.ndarray, "layer head"]) -> Decay:
    """D_sink of one prompt."""
    known = ~np.isnan(before)
    kept = known & (before >= FAINT)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(kept, after / before, 0.0).sum(1) / kept.sum(1)
        means = np.where(known, after, 0.0).sum(1) / np.where(known, before, 0.0).sum(1)
    return Decay(1 - ratio, np.where(known.any(1), 1 - means, np.nan), int((known & ~kept).sum()))


def predictions_change(base: Seen, edited: Seen, *, causal: bool) -> dict[str, float]:
    """KL(base || edited) over all real tokens and, for causal models, the change of the loss; NaN without a head."""
    if base.logits is None or edited.logits is None:
        return {"kl": float("nan"), "loss_change": float("nan")}
    kl = divergence(base.logits, edited.logits)
    if not causal:
        return {"kl": kl, "loss_change": float("nan")}
    change = next_token_loss(edited.logits, base.ids) - next_token_loss(base.logits, base.ids)
    return {"kl": kl, "loss_change": change}


def output_change(base: Seen, edited: Seen) -> float:
    """Largest absolute change of the model's output at a real token."""
    return float((edited.output.float() - base.output.float()).abs().max())


def remains(
    base: Float[Tensor, "layer dim"], edited: Float[Tensor, "layer dim"], dims: Sequence[int], layer: int
) -> dict[str, float]:
    """What is left of a position's strong entries after block `layer`, where the change was made.

    Only blocks count in which the unchanged model has the entries: where it erases them, an eraser that no longer
    meets them leaves their opposite, and that is not the entries coming back. For the same reason the changed state
    is measured along the unchanged entries, with its sign.

    Returns:
        `before`, `after`: largest size of the entries in the later blocks that have them (the last block looks at
        itself; so does a block behind which none has them), and the largest part of the changed state along them;
        `ratio` of the two, 1 for unchanged, 0 for gone, negative for reversed; `ratio_here`, the same right after the
        block; `cosine` of the state with its former self one block later. NaN where no block has the entries.
    """
    start = min(layer + 1, len(base) - 1)
    former, now = base[:, list(dims)].double(), edited[:, list(dims)].double()
    size = former.norm(dim=1)
    along = (now * former).sum(1) / size.clamp_min(torch.finfo(size.dtype).tiny)
    median = base.double().abs().median(dim=1).values
    has = (size > 0) & ((size >= PART * size.max()) | (size >= STANDS_OUT * median))
    later = has & (torch.arange(len(base)) >= start)
    if not later.any():
        later = has & (torch.arange(len(base)) == layer)
    before, after = _largest(size[later]), _largest(along[later])
    cosine = torch.nn.functional.cosine_similarity(base[start], edited[start], dim=0, eps=1e-30)
    return {
        "before": before,
        "after": after,
        "ratio": after / before,
        "ratio_here": float(along[layer] / size[layer]) if has[layer] else float("nan"),
        "cosine": float(cosine),
    }


def _largest(values: Float[Tensor, " block"]) -> float:
    return float(values.max()) if len(values) else float("nan")
