"""The Triton kernels equal the definition, in Triton's interpreter on the CPU; run by `test_triton.py`, alone.

The interpreter must be chosen before Triton is imported, so these tests have a process of their own.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinklens.kernels import triton_pass
from sinklens.kernels.spec import AttentionCall, Stat, Want

from .calls import MASKS, Case, assert_close, build, cases, expected, near_ties, output_error, true_lse

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton.py")

OUTPUT_BOUND = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def compare(case: Case) -> None:
    call, want, _ = build(case)
    want = replace(want, stats=triton_pass.SERVED)
    assert triton_pass.fits(call, want)
    true_output, truth = expected(call, want)
    ties = near_ties(call)
    output, found = triton_pass.fused(call, want)
    assert output.dtype == case.dtype
    assert output_error(output, true_output, call) <= OUTPUT_BOUND[case.dtype]
    assert_close(found, truth, ties=ties)


def compare_columns(case: Case) -> None:
    """Without output, with the log-sum-exp given or not."""
    call, want, _ = build(case)
    columns = replace(want, stats=frozenset({Stat.RECEIVED, Stat.RECEIVED_LOG, Stat.RECEIVED_MAX, Stat.LSE}))
    for lse in (None, true_lse(call)):
        swept = triton_pass.sweep(call, columns, lse)
        assert_close(swept, expected(call, columns)[1], bound=3e-6)


@settings(max_examples=6)
@given(cases(), st.sampled_from([1, 5, 37, 70]))
def test_every_kind_of_call(case: Case, keys: int) -> None:
    compare(replace(case, keys=keys))


@pytest.mark.parametrize("mask", MASKS)
def test_masks_over_several_blocks(mask: str) -> None:
    case = Case(2, 1, 2, 101, 101, 16, 8, mask, None, True, True, True, "few", 1, 3)
    compare(case)
    if mask in ("window", "by head"):
        compare_columns(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "softcap"), [(64, None), (128, 2.0), (80, 50.0)])
def test_types_and_widths(dtype: torch.dtype, dim: int, softcap: float | None) -> None:
    compare(Case(1, 1, 2, 70, 70, dim, dim, "causal", softcap, True, False, True, "by head", 1, 5, dtype))


@pytest.mark.parametrize(("queries", "keys"), [(1, 70), (33, 70), (70, 33)])
def test_decode_and_chunks(queries: int, keys: int) -> None:
    compare(Case(1, 1, 2, queries, keys, 8, 5, "causal", None, False, True, True, "one key", 1, 1))


def test_a_statistic_does_not_depend_on_what_else_is_asked() -> None:
    call, want, _ = build(Case(1, 1, 2, 37, 37, 8, 5, "window", None, True, True, True, "few", 1, 2))
    for stat in sorted(triton_pass.SERVED):
        alone = replace(want, stats=frozenset({stat}))
        found = triton_pass.sweep(call, alone)
        assert found.values.keys() == {stat}
        assert_close(found, expected(call, alone)[1], ties=near_ties(call))


def test_what_hidden_keys_and_uncounted_rows_hold_does_not_matter() -> None:
    query, key, value = torch.randn(1, 1, 90, 8), torch.randn(1, 1, 90, 8), torch.randn(1, 1, 90, 8)
    counted = torch.arange(90)[None] < 80
    want = Want(frozenset({Stat.RECEIVED, Stat.RECEIVED_LOG, Stat.ENTROPY, Stat.TOP1, Stat.RECEIVED_MAX}))
    call = AttentionCall(query, key, value, 0.4, counted=counted)
    clean = triton_pass.sweep(call, want)
    query[:, :, 80:] = float("nan")
    spoilt = triton_pass.sweep(call, want)
    for stat in want.stats:
        assert torch.equal(clean[stat], spoilt[stat]), stat


def test_rows_that_differ_hardly_keep_their_digits() -> None:
    """Long sums of nearly equal weights: blocks are added up apart, so nothing drifts."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 500, 4) * 1e-3, torch.randn(1, 1, 500, 4)
    call = AttentionCall(query, key, key, 1.0, causal=False)
    want = Want(frozenset({Stat.RECEIVED, Stat.ENTROPY}))
    found = triton_pass.sweep(call, want)
    assert_close(found, expected(call, want)[1])


def test_the_kernels_pass_their_own_check_and_a_wrong_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [(torch.device("cpu"), dtype, 16, 16) for dtype in OUTPUT_BOUND]
    triton_pass.trusted.cache_clear()
    assert all(map(triton_pass.trusted, kinds))
    triton_pass.trusted.cache_clear()
    monkeypatch.setattr(triton_pass, "_LN2", 0.7)
    assert not triton_pass.trusted(kinds[0])
    triton_pass.trusted.cache_clear()
