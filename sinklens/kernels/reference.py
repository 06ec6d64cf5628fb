"""Dense attention statistics in double precision: the definition of every `Stat`, the kernels' oracle.

Written to be read. It builds the whole `[batch head query key]` map and is meant for short sequences.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .edits import edited
from .shapes import Sizes, four_axes, sizes_of, visible_of
from .spec import LEAST_LEFT, AttentionCall, AttentionStatistics, Stat, Want


def attention_reference(
    call: AttentionCall, want: Want, *, dtype: torch.dtype | None = None
) -> tuple[Float[Tensor, "batch query head value_dim"], AttentionStatistics]:
    """Attention output and statistics, computed in float64 from the full map.

    Args:
        call: The attention call.
        want: The statistics.
        dtype: Type of the statistics and of the output; None means float32 and the query's type.

    Returns:
        The output (0 in rows without a visible key) and the statistics.
    """
    sizes = sizes_of(call, want)
    visible = dense_visibility(call, sizes)
    logits = dense_logits(call, sizes, visible)
    norm = torch.logsumexp(logits, -1)
    if call.learned_sinks is not None:
        norm = torch.logaddexp(norm, call.learned_sinks.double()[:, None])
    weights = torch.exp(logits - norm[..., None].masked_fill(~visible.any(-1, keepdim=True), 0.0))
    learned = 1.0 - weights.sum(-1)
    if call.edits:
        everything = slice(0, sizes.queries), slice(0, sizes.keys)
        weights, learned = edited(weights, learned, call.edits, *everything)
    value = call.value.double().repeat_interleave(sizes.group, 1)
    output = (weights @ value).transpose(1, 2)

    counted = torch.ones_like(visible[:, 0, :, 0]) if call.counted is None else call.counted
    rows = counted & visible.any(-1).any(1)
    statistics = AttentionStatistics(visible=(visible & rows[:, None, :, None]).sum(2), rows=rows)
    if call.mask is None or call.mask.ndim < 4 or call.mask.shape[1] == 1:
        statistics.visible = statistics.visible[:, :1]  # pyright: ignore[reportOptionalSubscript]
    live = rows[:, None] & visible.any(-1)
    for stat in want.stats:
        found = _statistic(stat, want, call, weights, norm, value, live, learned)
        statistics.values[stat] = found.to(dtype or torch.float32)
    return output.to(dtype or call.query.dtype), statistics


def dense_visibility(call: AttentionCall, sizes: Sizes) -> Bool[Tensor, "batch head query key"]:
    """Which key each row sees, by the mask if there is one, else by `causal`."""
    full = (sizes.batch, sizes.heads, sizes.queries, sizes.keys)
    if call.mask is not None:
        return visible_of(four_axes(call.mask, sizes.queries, sizes.keys)).expand(full)
    if not call.causal:
        return torch.ones(full, dtype=torch.bool, device=call.query.device)
    place, key = _places(sizes, call.query.device)
    return (key <= place).expand(full)


def _places(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Key position of each row `[query 1]` and of each key `[key]`."""
    key = torch.arange(sizes.keys, device=device)
    return torch.arange(sizes.queries, device=device)[:, None] + sizes.offset, key


def dense_logits(
    call: AttentionCall, sizes: Sizes, visible: Bool[Tensor, "batch head query key"]
) -> Float[Tensor, "batch head query key"]:
    """Scaled, capped and masked logits in float64; hidden ones are -inf."""
    key = call.key.double().repeat_interleave(sizes.group, 1)
    logits = call.query.double() @ key.mT * call.scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    if call.mask is not None and call.mask.dtype != torch.bool:
        logits = logits + call.mask.double()
    return logits.masked_fill(~visible, float("-inf"))


def _statistic(
    stat: Stat,
    want: Want,
    call: AttentionCall,
    weights: Tensor,
    norm: Tensor,
    value: Tensor,
    live: Tensor,
    learned: Tensor,
) -> Tensor:
    """One statistic; `weights` is A `[batch head query key]`, `live` the counted rows `[batch head query]`."""
    A = torch.where(live[..., None], weights, 0.0)
    queries, keys = A.shape[2:]
    place = torch.arange(queries, device=A.device)[:, None] + (keys - queries)
    distance = (place - torch.arange(keys, device=A.device)).double()
    match stat:
        case Stat.RECEIVED:
            return A.sum(2)
        case Stat.RECEIVED_SQUARED:
            return A.square().sum(2)
        case Stat.RECEIVED_LOG:
            return torch.xlogy(A, A).sum(2)
        case Stat.RECEIVED_TAIL:
            counted = live.any(1)
            rank_from_end = counted.flip(1).cumsum(1).flip(1)
            return torch.where((counted & (rank_from_end <= want.tail))[:, None, :, None], A, 0.0).sum(2)
        case Stat.RECEIVED_ROWS:
            assert want.probes is not None  # sizes_of has refused the call otherwise
            return torch.where(want.probes[:, None, :, None], A, 0.0).sum(2)
        case Stat.RECEIVED_BAND | Stat.RECEIVED_BAND_REST:
            inside = (distance >= want.band[0]) & (distance <= want.band[1])
            if stat is Stat.RECEIVED_BAND:
                return torch.where(inside, A, 0.0).sum(2)
            return torch.where(inside, _rest(want, A, torch.where(live, learned, 0.0)), 0.0).sum(2)
        case Stat.RECEIVED_MAX:
            return A.amax(2)
        case Stat.TOP1:
            return torch.zeros_like(A[:, :, 0]).scatter_add(2, A.argmax(-1), live.double())
        case Stat.DIAGONAL:
            return torch.where(distance == 0, A, 0.0).sum(-1)
        case Stat.ENTROPY:
            return -torch.xlogy(A, A).sum(-1)
        case Stat.ENTROPY_NORMALISED:
            keys_seen = dense_visibility(call, sizes_of(call, want)).sum(-1)
            entropy = -torch.xlogy(A, A).sum(-1) / keys_seen.clamp(min=2).double().log()
            return torch.where(keys_seen > 1, entropy, 0.0)
        case Stat.DISTANCE:
            return (A * distance).sum(-1)
        case Stat.DISTANCE_WINDOWED:
            return (A * distance.clamp(max=want.window)).sum(-1)
        case Stat.ROW_MAX:
            return A.amax(-1)
        case Stat.LSE:
            return torch.where(live, norm, 0.0)
        case Stat.LEARNED_SINK:
            return torch.where(live, learned, 0.0)
        case Stat.GROUP_MASS | Stat.GROUP_OUTPUT:
            assert want.groups is not None  # sizes_of has refused the call otherwise
            groups = want.groups[:, :, None] if want.groups.ndim == 3 else want.groups
            if stat is Stat.GROUP_MASS:
                return A @ groups.double().permute(1, 2, 3, 0)
            return torch.stack([(A * group[:, :, None]) @ value for group in groups], 3)


def _rest(want: Want, A: Tensor, learned: Tensor) -> Tensor:
    """`A` without the first group, over the mass off it (a learned sink's share included), times the row's part."""
    assert want.groups is not None  # sizes_of has refused the call otherwise
    group = want.groups[0][:, None] if want.groups.ndim == 3 else want.groups[0]
    others = A.masked_fill(group[:, :, None], 0.0)
    # 1 - mass, added up from what is left: a difference would cancel where the group has nearly everything.
    left = others.sum(-1) + learned.clamp(min=0.0)
    part = (left / LEAST_LEFT - 1.0).clamp(0.0, 1.0)
    return torch.where(part[..., None] <= 0, 0.0, others * (part / left)[..., None])
