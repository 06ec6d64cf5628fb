"""Input that is not as it should be: it is refused, or its result is NaN as by definition, and never a wrong number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from sinklens.core.errors import UsageError
from sinklens.kernels.asks import PER_KEY
from sinklens.kernels.blocked import attention_fused, attention_sweep
from sinklens.kernels.reference import attention_reference
from sinklens.kernels.spec import AttentionCall, BlockPlan, Stat, Want

from .calls import ALL, assert_close, expected, near_ties

SERVED = ALL - {Stat.RECEIVED_SQUARED, Stat.RECEIVED_MAX, Stat.GROUP_OUTPUT}
LENGTH = 53


def call_of(length: int = LENGTH) -> tuple[AttentionCall, Want]:
    generator = torch.Generator().manual_seed(length)
    query, key, value = (
        torch.randn(shape, generator=generator)
        for shape in ((2, 6, length, 8), (2, 2, length, 8), (2, 2, length, 5))
    )
    groups = torch.zeros(2, 2, length, dtype=torch.bool)
    groups[..., 0] = True
    want = Want(SERVED, groups=groups, probes=torch.arange(2 * length).view(2, length) % 3 == 0)
    return AttentionCall(query, key, value, 0.4), want


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("stats", [SERVED, ALL])
def test_what_is_nan_by_definition_is_nan(stats: frozenset[Stat], native: bool) -> None:
    """Rows without a softmax: of a query that is NaN, or whose logits are all infinitely low."""
    call, want = call_of()
    want = replace(want, stats=stats)
    for spoiled in (torch.nan, -torch.inf):
        call.key[0, 1].abs_()
        call.query[0, 3, 20] = spoiled
        true_output, truth = attention_reference(call, want)
        output, found = attention_fused(call, want, BlockPlan(native=native))
        assert int(true_output.isnan().any(-1).sum()) == 1
        assert torch.equal(output.isnan(), true_output.isnan())
        for stat in stats - {Stat.LSE, Stat.LEARNED_SINK, Stat.TOP1}:
            missed = truth[stat].isnan() & ~found[stat].isnan()
            # The weight of a key that is still to come is 0, whatever the row holds.
            assert not (missed[..., :21] if stat in PER_KEY else missed).any(), stat


@pytest.mark.parametrize("native", [True, False])
def test_a_key_that_is_nan_spoils_the_rows_that_see_it(native: bool) -> None:
    call, want = call_of()
    call.key[0, 1, 20] = torch.nan
    output, found = attention_fused(call, want, BlockPlan(native=native))
    assert output[0, 20:, 3:].isnan().all()
    assert found[Stat.ENTROPY][0, 3:, 20:].isnan().all()
    assert found[Stat.ROW_MAX][0, 3:, 20:].isnan().all()
    assert not output[1].isnan().any()


@pytest.fixture(params=[torch.float64, torch.bfloat16])
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


def test_the_callers_default_dtype_does_not_matter(default_dtype: torch.dtype) -> None:
    """The compiled kernels write float32: memory of another type would be too small, or misread."""
    call, want = call_of()
    true_output, truth = expected(call, want)
    torch.set_default_dtype(default_dtype)
    output, found = attention_fused(call, want)
    swept = attention_sweep(call, want)
    torch.testing.assert_close(output.double(), true_output, atol=2e-6, rtol=0)
    assert_close(found, truth, ties=near_ties(call))
    assert_close(swept, truth, ties=near_ties(call))


@pytest.mark.parametrize("axis", ["batch", "queries", "keys"])
def test_empty_calls_are_refused(axis: str) -> None:
    call, want = call_of()
    if axis == "batch":
        call = replace(call, query=call.query[:0], key=call.key[:0], value=call.value[:0])
    elif axis == "queries":
        call = replace(call, query=call.query[:, :, :0])
    else:
        call = replace(call, key=call.key[:, :, :0], value=call.value[:, :, :0])
    with pytest.raises(UsageError, match="empty"):
        attention_fused(call, want)


@pytest.mark.parametrize("native", [True, False])
def test_a_window_that_no_key_is_beyond(native: bool) -> None:
    """Its cap must not cost what a sum of small distances has of digits."""
    call, want = call_of()
    want = Want(frozenset({Stat.DISTANCE_WINDOWED}), window=1_000_000)
    for each in (call, replace(call, causal=False)):
        truth = expected(each, want)[1]
        assert_close(attention_fused(each, want, BlockPlan(native=native))[1], truth)
