"""Who sees whom, without a `[query key]` map: rows that count, rows that see each key, keys a block needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .shapes import Sizes, four_axes, visible_of
from .spec import AttentionCall

RowRange = tuple[int, int]


@dataclass(frozen=True)
class Visibility:
    """What the kernels need to know of a mask before they start.

    Attributes:
        rows: Rows that count: `counted`, and some head sees a key.
        counts: Counted rows that see each key; the head axis is 1 unless the mask differs by head.
        seen: Rows that see a key, per head of the mask; None when every row does.
        spans: Per block of rows, the range of keys `[first, last)` outside of which no row sees anything.
        Never
            empty: rows that see nothing get some key, hidden from them.
    """

    rows: Bool[Tensor, "batch query"]
    counts: Int[Tensor, "batch visible_head key"]
    seen: Bool[Tensor, "mask_batch visible_head query"] | None
    spans: tuple[RowRange, ...]


def visibility(call: AttentionCall, sizes: Sizes, blocks: Sequence[RowRange]) -> Visibility:
    """Counts, rows and spans of a call whose query rows are walked in `blocks`."""
    device = call.query.device
    counted = call.counted
    if counted is None:
        counted = torch.ones(sizes.batch, sizes.queries, dtype=torch.bool, device=device)
    if call.mask is not None:
        return _of_mask(four_axes(call.mask, sizes.queries, sizes.keys), counted, blocks)
    if not call.causal:
        counts = counted.sum(1)[:, None, None].expand(-1, 1, sizes.keys)
        return Visibility(counted, counts, None, tuple((0, sizes.keys) for _ in blocks))
    return _of_causal(sizes, counted, blocks, unpadded=call.counted is None)


def _of_causal(sizes: Sizes, counted: Tensor, blocks: Sequence[RowRange], *, unpadded: bool) -> Visibility:
    """Closed form: rows `k - offset` and later see key `k`, so counts are sums from a row to the end."""
    device, offset = counted.device, sizes.offset
    seen = None
    if offset < 0:  # more rows than keys: the first rows stand before every key
        seen = (torch.arange(sizes.queries, device=device) + offset >= 0)[None, None]
        counted = counted & seen[0]
    if unpadded:
        counts = torch.arange(sizes.keys, 0, -1, device=device).clamp(max=sizes.queries)
        counts = counts.expand(sizes.batch, 1, -1)
    else:
        first_row = (torch.arange(sizes.keys, device=device) - offset).clamp(min=0)
        counts = counted.flip(1).cumsum(1).flip(1)[:, None, first_row]
    spans = tuple((0, max(1, min(sizes.keys, end + offset))) for _, end in blocks)
    return Visibility(counted, counts, seen, spans)


def _of_mask(mask: Tensor, counted: Tensor, blocks: Sequence[RowRange]) -> Visibility:
    """One reading of the mask, a block of rows at a time, as bytes: torch reduces those far faster than booleans."""
    seen, touched, counts = [], [], []
    for s, e in blocks:
        visible = visible_of(mask[:, :, s:e]).view(torch.uint8)
        seen.append(visible.amax(-1).bool())
        touched.append(visible.amax((0, 1, 2)))
    seen = torch.cat(seen, -1)
    seeing = seen.any(1)
    rows = counted & seeing
    left_out = bool((seeing & ~counted).any())
    for s, e in blocks:
        visible = visible_of(mask[:, :, s:e]).view(torch.uint8)
        if left_out:
            visible = visible * rows[:, None, s:e, None].to(torch.uint8)
        narrow = torch.uint8 if e - s < 256 else torch.int32  # as many ones as rows
        counts.append(visible.sum(2, dtype=narrow))
    total = torch.stack(counts).sum(0, dtype=torch.int64).expand(len(rows), -1, -1)
    return Visibility(rows, total, None if bool(seen.all()) else seen, _spans(torch.stack(touched) > 0))


def _spans(touched: Tensor) -> tuple[RowRange, ...]:
    """First and one past the last True of each row of `[block, key]`; the first key where there is none."""
    first = touched.to(torch.uint8).argmax(1)
    last = touched.shape[1] - touched.flip(1).to(torch.uint8).argmax(1)
    last = torch.where(touched.any(1), last, 1)
    ranges = torch.stack([first, last], 1)
    return tuple((int(a), int(b)) for a, b in ranges.tolist())


def keys_seen(
    call: AttentionCall, sizes: Sizes, blocks: Sequence[RowRange]
) -> Int[Tensor, "mask_batch visible_head query"]:
    """Number of keys that each row sees."""
    if call.mask is not None:
        mask = four_axes(call.mask, sizes.queries, sizes.keys)
        return torch.cat([visible_of(mask[:, :, s:e]).sum(-1) for s, e in blocks], -1)
    place = torch.arange(sizes.queries, device=call.query.device) + sizes.offset
    seen = (place + 1).clamp(0, sizes.keys) if call.causal else torch.full_like(place, sizes.keys)
    return seen[None, None]


def tail_rows(rows: Bool[Tensor, "batch query"], tail: int) -> Bool[Tensor, "batch query"]:
    """The last `tail` of the rows that count."""
    return rows & (rows.flip(1).cumsum(1).flip(1) <= tail)


def reach(rows: Bool[Tensor, " q"]) -> tuple[int, int]:
    """First and last row that is True; an empty range without one."""
    found = rows.nonzero()
    return (int(found[0]), int(found[-1])) if len(found) else (len(rows), -1)
