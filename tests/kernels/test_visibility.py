"""Counted rows and visible-query counts, against a count over the whole map."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from sinklens.kernels.reference import dense_visibility
from sinklens.kernels.shapes import sizes_of
from sinklens.kernels.spec import AttentionCall, Want
from sinklens.kernels.visibility import visibility
from sinklens.kernels.walk import chunks, row_blocks

from .calls import Case, build, cases


@settings(max_examples=60)
@given(cases())
def test_counts_rows_and_spans(case: Case) -> None:
    call, want, plan = build(case)
    sizes = sizes_of(call, want)
    blocks = row_blocks(sizes, plan)
    found = visibility(call, sizes, blocks)
    dense = dense_visibility(call, sizes)
    counted = torch.ones(case.batch, case.queries, dtype=torch.bool) if call.counted is None else call.counted
    rows = counted & dense.any(-1).any(1)
    assert torch.equal(found.rows, rows)
    counts = (dense & rows[:, None, :, None]).sum(2)
    assert not found.counts.is_floating_point()
    assert torch.equal(found.counts.expand_as(counts), counts)
    assert torch.equal(
        dense.any(-1), torch.ones(()).bool() if found.seen is None else found.seen.expand(dense.shape[:3])
    ) or (found.seen is None and bool(dense.any(-1).all()))
    for (start, end), (first, last) in zip(blocks, found.spans, strict=True):
        inside = torch.zeros(case.keys, dtype=torch.bool)
        inside[first:last] = True
        assert last > first
        assert not dense[:, :, start:end][..., ~inside].any()


@settings(max_examples=60)
@given(cases())
def test_blocks_and_chunks_cover_everything_once(case: Case) -> None:
    call, want, plan = build(case)
    sizes = sizes_of(call, want)
    blocks = row_blocks(sizes, plan)
    assert [row for start, end in blocks for row in range(start, end)] == list(range(case.queries))
    seen = torch.zeros(case.batch, case.heads, dtype=torch.int)
    for chunk in chunks(sizes, plan, blocks[0][1]):
        seen[chunk.batch, chunk.heads] += 1
        assert (
            chunk.heads.stop - chunk.heads.start == (chunk.kv_heads.stop - chunk.kv_heads.start) * case.group
        )
    assert torch.equal(seen, torch.ones_like(seen))


@pytest.mark.parametrize("rows", [255, 256, 257, 600])
def test_keys_that_many_rows_see_are_counted_in_full(rows: int) -> None:
    """Rows are counted as bytes, a block at a time, whatever the size of a block."""
    mask = torch.ones(rows, 5, dtype=torch.bool)
    mask[0, 1], mask[:, 3] = False, False
    counted = torch.ones(2, rows, dtype=torch.bool)
    counted[1, :7] = False
    tensors = (torch.randn(2, 2, size, 3) for size in (rows, 5, 5))
    call = AttentionCall(*tensors, scale=1.0, mask=mask[None, None], counted=counted)
    found = visibility(call, sizes_of(call, Want(frozenset())), [(0, rows)])
    assert found.counts[:, 0].tolist() == [
        [rows, rows - 1, rows, 0, rows],
        [rows - 7, rows - 7, rows - 7, 0, rows - 7],
    ]
