"""Attention statistics estimated from some of the query rows, with their standard errors.

Rows are drawn by strata of position, without replacement (`RowSample`). With N_h rows in stratum h, n_h of them drawn,
and y_q what row q gives, the total over all rows is estimated by sum_h N_h mean_h(y), which is unbiased, and its
variance by sum_h N_h^2 (1 - n_h / N_h) s_h^2 / n_h with s_h^2 the sample variance within the stratum, which is
unbiased too (Cochran, Sampling Techniques, 1977, theorems 5.1 and 5.4). A key that a row does not see gets 0 from it,
so this holds for every key. How many rows see a key is counted, not estimated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.errors import UsageError
from .blocked import attention_sweep
from .sample import RowSample
from .shapes import sizes_of
from .spec import AttentionCall, AttentionStatistics, BlockPlan, Stat, Want
from .visibility import visibility
from .walk import row_blocks

PER_KEY = (Stat.RECEIVED, Stat.TOP1)
PER_ROW = (Stat.ENTROPY, Stat.ENTROPY_NORMALISED, Stat.DISTANCE, Stat.ROW_MAX, Stat.LEARNED_SINK)
ESTIMABLE = frozenset({*PER_KEY, *PER_ROW, Stat.RECEIVED_TAIL})
"""Statistics that can be had from a sample; `RECEIVED_TAIL` is exact, because its rows are always taken."""

_DEFAULT_PLAN = BlockPlan()


def sampled_sweep(
    call: AttentionCall, want: Want, samples: Sequence[RowSample | None], plan: BlockPlan = _DEFAULT_PLAN
) -> AttentionStatistics:
    """Statistics of a call estimated from a sample of its rows, beside a kernel that computes the output.

    Args:
        call: The attention call.
        want: Statistics among `ESTIMABLE`.
        samples: Rows of each prompt of the batch, as places among the query rows; None takes all of a prompt's rows.
        plan: As for `attention_sweep`.

    Returns:
        Sums over rows are estimates of the sums over all rows, with their `variances`. Values per row are those of the
        rows drawn, 0 elsewhere. `samples` says which those are. Where every prompt takes all rows the result is that
        of `attention_sweep`, bit for bit.

    Raises:
        UsageError: A statistic that cannot be had from a sample, or a map that was edited.
    """
    _refuse(call, want)
    if all(sample is None for sample in samples):
        return replace(attention_sweep(call, want, None, plan), samples=tuple(samples))
    sizes = sizes_of(call, want)
    view = visibility(call, sizes, row_blocks(sizes, plan))
    device = call.query.device
    values = {
        stat: torch.zeros(
            sizes.batch, sizes.heads, sizes.keys if _per_key(stat) else sizes.queries, device=device
        )
        for stat in want.stats
    }
    variances = {stat: torch.zeros_like(values[stat]) for stat in PER_KEY if stat in want.stats}
    for row, sample in enumerate(samples):
        found = {stat: value[row] for stat, value in values.items()}
        spread = {stat: value[row] for stat, value in variances.items()}
        if sample is None:
            alone = attention_sweep(_prompt(call, row), want, None, plan)
            for stat, value in found.items():
                value.copy_(alone[stat][0])
        else:
            _estimate(_prompt(call, row), want, sample, plan, found, spread)
    return AttentionStatistics(values, view.counts, view.rows, variances, tuple(samples))


def row_mean(
    values: Float[Tensor, "head query"], sample: RowSample
) -> tuple[Float[Tensor, " head"], Float[Tensor, " head"]]:
    """Mean over all rows of a value per row that is known for the rows drawn, and its standard error."""
    total = torch.zeros(len(values), dtype=torch.float64, device=values.device)
    variance = torch.zeros_like(total)
    for stratum in sample.strata:
        drawn = values[:, torch.from_numpy(stratum.rows).to(values.device)].double()
        total += stratum.size * drawn.mean(-1)
        if len(stratum.rows) < stratum.size:
            variance += stratum.factor * drawn.var(-1)
    rows = sum(stratum.size for stratum in sample.strata)
    return (total / rows).to(values.dtype), (variance.sqrt() / rows).to(values.dtype)


def _refuse(call: AttentionCall, want: Want) -> None:
    beyond = sorted(want.stats - ESTIMABLE)
    if beyond:
        raise UsageError(
            f"{', '.join(beyond)} cannot be had from a sample of the query rows.",
            detail=f"It gives: {', '.join(sorted(ESTIMABLE))}.",
        )
    if call.edits:
        raise UsageError(
            "An attention map that is edited is not estimated from a sample of its rows.",
            hint="Trace it without sampling, or take the mitigation off.",
        )


def _per_key(stat: Stat) -> bool:
    return stat in PER_KEY or stat is Stat.RECEIVED_TAIL


def _prompt(call: AttentionCall, row: int) -> AttentionCall:
    """One prompt of a batch, as a view."""
    one = slice(row, row + 1)
    mask = call.mask
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]
        mask = mask[one] if mask.shape[0] > 1 else mask
    counted = None if call.counted is None else call.counted[one]
    return replace(
        call, query=call.query[one], key=call.key[one], value=call.value[one], mask=mask, counted=counted
    )


def _some_rows(call: AttentionCall, rows: Int[Tensor, " drawn"]) -> AttentionCall:
    """Some rows of a prompt, in ascending order, against the keys that they may see."""
    places = rows + call.key.shape[2] - call.query.shape[2]
    mask, key, value = call.mask, call.key, call.value
    if mask is not None:
        mask = mask[:, :, rows] if mask.shape[2] > 1 else mask
    elif call.causal:
        last = max(1, int(places[-1]) + 1)
        key, value = key[:, :, :last], value[:, :, :last]
        mask = (torch.arange(last, device=rows.device) <= places[:, None])[None, None]
    return replace(
        call, query=call.query[:, :, rows], key=key, value=value, mask=mask, causal=False, counted=None
    )


def _estimate(
    call: AttentionCall,
    want: Want,
    sample: RowSample,
    plan: BlockPlan,
    values: dict[Stat, Tensor],
    variances: dict[Stat, Tensor],
) -> None:
    """Fill in the values and variances of one prompt, stratum by stratum."""
    asked = set(want.stats) - {Stat.RECEIVED_TAIL}
    if Stat.RECEIVED_TAIL in want.stats:
        asked.add(Stat.RECEIVED)
    if Stat.DISTANCE in asked and call.learned_sinks is not None:
        asked.add(Stat.LEARNED_SINK)
    sums = {stat: torch.zeros_like(value, dtype=torch.float64) for stat, value in variances.items()}
    spread = {stat: torch.zeros_like(value) for stat, value in sums.items()}
    for stratum in sample.strata:
        rows, drawn = torch.from_numpy(stratum.rows).to(call.query.device), len(stratum.rows)
        some, partly = _some_rows(call, rows), drawn < stratum.size
        squares = {Stat.RECEIVED_SQUARED} if partly and Stat.RECEIVED in sums else set()
        found = attention_sweep(some, Want(frozenset(asked | squares)), None, plan)
        keys = some.key.shape[2]
        for stat in sums:
            part = found[stat][0].double()
            sums[stat][:, :keys] += part * (stratum.size / drawn)
            if partly:
                # A row's part in TOP1 is 0 or 1, which is its own square.
                square = part if stat is Stat.TOP1 else found[Stat.RECEIVED_SQUARED][0].double()
                within = (square - part.square() / drawn).clamp(min=0) / (drawn - 1)
                spread[stat][:, :keys] += stratum.factor * within
        for stat in want.stats.intersection(PER_ROW):
            values[stat][:, rows] = _per_row(found, stat, some, rows, call)
        if stratum is sample.strata[-1] and Stat.RECEIVED_TAIL in want.stats:
            values[Stat.RECEIVED_TAIL][:, :keys] = found[Stat.RECEIVED][0]
    for stat, total in sums.items():
        values[stat].copy_(total)
        variances[stat].copy_(spread[stat])


def _per_row(
    found: AttentionStatistics, stat: Stat, some: AttentionCall, rows: Tensor, call: AttentionCall
) -> Float[Tensor, "head drawn"]:
    value = found[stat][0]
    if stat is not Stat.DISTANCE:
        return value
    # Among themselves the rows stand right before the last of their keys; here they stand where they do.
    own = rows + call.key.shape[2] - call.query.shape[2]
    assumed = torch.arange(len(rows), device=rows.device) + some.key.shape[2] - len(rows)
    mass = 1.0 if call.learned_sinks is None else 1.0 - found[Stat.LEARNED_SINK][0]
    return value + (own - assumed) * mass
