"""The blocked kernels equal the definition, for every kind of call; the compiled row pass has its own tests."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from sinklens.core.errors import UsageError
from sinklens.kernels.blocked import attention_fused, attention_sweep
from sinklens.kernels.spec import AttentionCall, BlockPlan, Stat, Want

from .calls import ALL, Case, assert_close, build, cases, expected, near_ties, output_error, true_lse

# Of float32 arithmetic on logits of a few units; relative to the largest value of a statistic.
BOUND = 1e-6
# Weights, their product with the values, and that less a learned sink's share are each rounded to 8 bits.
HALF_BOUND = 2**-7


def compare(case: Case, *, output_bound: float = 2 * BOUND) -> None:
    call, want, plan = build(case)
    true_output, truth = expected(call, want)
    ties = near_ties(call)
    output, fused = attention_fused(call, want, plan)
    assert output.dtype == case.dtype
    assert output.shape == (case.batch, case.queries, case.heads, case.value_dim)
    assert output_error(output, true_output, call) <= output_bound
    assert_close(fused, truth, ties=ties, bound=BOUND)
    assert_close(attention_sweep(call, want, None, plan), truth, ties=ties, bound=BOUND)
    # Two roundings meet here: that of the given log-sum-exp, and that of the logits it is taken from.
    assert_close(attention_sweep(call, want, true_lse(call), plan), truth, ties=ties, bound=3 * BOUND)


@settings(max_examples=150)
@given(cases())
def test_blocked_equals_the_definition(case: Case) -> None:
    compare(case)


@settings(max_examples=25)
@given(cases(dtype=torch.bfloat16))
def test_statistics_of_a_bfloat16_model_are_float32_exact(case: Case) -> None:
    compare(case, output_bound=HALF_BOUND)


@settings(max_examples=15)
@given(cases(dtype=torch.float16))
def test_statistics_of_a_float16_model_are_float32_exact(case: Case) -> None:
    compare(case, output_bound=2**-11)


def long_case(**changes: object) -> Case:
    """Longer than the thresholds inside: chunked arg-max, several blocks, keys that are no multiple of a chunk."""
    case = Case(1, 2, 3, 331, 331, 8, 5, "causal", None, False, False, True, "one key", 200_000, 7)
    return replace(case, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"queries": 320, "keys": 640},
        {"queries": 64, "keys": 577, "mask": "window", "counted": True},
        {"mask": "left padding", "batch": 2, "sinks": True},
        {"queries": 1, "keys": 701},
        {"queries": 613, "keys": 331},
        {"dtype": torch.bfloat16, "dim": 64},
        {"groups": "many", "softcap": 2.0},
    ],
)
def test_long_calls(changes: dict[str, object]) -> None:
    compare(long_case(**changes), output_bound=HALF_BOUND if "dtype" in changes else 2 * BOUND)


@pytest.mark.parametrize("stat", list(Stat))
def test_a_statistic_does_not_depend_on_what_else_is_asked(stat: Stat) -> None:
    call, everything, plan = build(long_case(sinks=True, mask="window", counted=True, queries=301))
    alone = replace(everything, stats=frozenset({stat}))
    truth = expected(call, alone)[1]
    plans = (plan, replace(plan, native=False))
    for found in (
        *(attention_fused(call, alone, each)[1] for each in plans),
        *(attention_sweep(call, alone, None, each) for each in plans),
        *(attention_sweep(call, alone, true_lse(call), each) for each in plans),
    ):
        assert found.values.keys() == {stat}
        assert_close(found, truth, ties=near_ties(call), bound=3 * BOUND)


def test_nothing_asked_gives_output_counts_and_rows() -> None:
    call, _, plan = build(long_case())
    output, found = attention_fused(call, Want(frozenset()), plan)
    assert found.values == {}
    assert_close(found, expected(call, Want(frozenset()))[1])
    torch.testing.assert_close(output.double(), expected(call, Want(frozenset()))[0], atol=1e-6, rtol=0)
    assert attention_sweep(call, Want(frozenset())).values == {}


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.0])
def test_log_sum_exp_of_a_row_that_sees_nothing_does_not_matter(value: float, native: bool) -> None:
    """Kernels disagree on it."""
    mask = torch.rand(2, 1, 11, 7) > 0.4
    mask[:, :, [0, 4]] = False
    query, key = torch.randn(2, 4, 11, 8), torch.randn(2, 2, 7, 8)
    call = AttentionCall(query, key, key, 0.3, mask=mask)
    groups, probes = torch.rand(2, 2, 7) > 0.7, torch.rand(2, 11) > 0.5
    stats = Want(ALL, groups=groups, probes=probes, band=(1, 4))
    lse = true_lse(call)
    lse[:, :, [0, 4]] = value
    found = attention_sweep(call, stats, lse, BlockPlan(native=native))
    assert_close(found, expected(call, stats)[1], ties=near_ties(call), bound=3 * BOUND)


@settings(max_examples=20)
@given(cases(softcap=None, sinks=False, groups="one key"))
def test_output_equals_scaled_dot_product_attention(case: Case) -> None:
    call, _, plan = build(case)
    mask = call.mask
    if mask is None and call.causal:
        place = torch.arange(case.queries)[:, None] + case.keys - case.queries
        mask = torch.arange(case.keys) <= place
    found = torch.nn.functional.scaled_dot_product_attention(
        call.query, call.key, call.value, attn_mask=mask, scale=call.scale, enable_gqa=True
    )
    output = attention_fused(call, Want(frozenset()), plan)[0].transpose(1, 2)
    # A row that sees nothing: 0 here and under boolean masks, the mean of the values under finite additive ones.
    sees = torch.ones(1, dtype=torch.bool)
    if mask is not None:
        sees = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2).any(-1)[
            ..., None
        ]
    difference = torch.where(sees, output - found, 0.0)
    assert float(difference.abs().max()) <= 2e-6


def test_rounded_scores_stay_within_the_stated_bound() -> None:
    """Logits rounded to bfloat16, as an eager bfloat16 model rounds them: shares to about one percent."""
    call, want, _ = build(long_case(dtype=torch.bfloat16, dim=64))
    truth = expected(call, want)[1]
    found = attention_fused(call, want, BlockPlan(score_dtype=torch.bfloat16))[1]
    assert float((found[Stat.DIAGONAL] - truth[Stat.DIAGONAL]).abs().max()) < 2e-2
    assert float((found[Stat.RECEIVED] / truth[Stat.RECEIVED] - 1).abs().max()) < 2e-2
    assert float((found[Stat.RECEIVED] - truth[Stat.RECEIVED]).abs().max()) > 1e-5  # it did round


def test_float64_input_is_computed_in_float64() -> None:
    call, want, plan = build(long_case(dtype=torch.float64))
    output, found = attention_fused(call, want, plan)
    true_output, truth = expected(call, want)
    torch.testing.assert_close(output, true_output, atol=1e-12, rtol=0)
    assert_close(found, truth, bound=1e-7)


def test_autocast_of_the_caller_does_not_round() -> None:
    call, want, plan = build(long_case())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, found = attention_fused(call, want, plan)
    plain, truth = attention_fused(call, want, plan)
    assert torch.equal(output, plain)
    assert all(torch.equal(found[stat], truth[stat]) for stat in ALL)


def test_scratch_memory_made_under_inference_mode_serves_outside_of_it() -> None:
    call, want, plan = build(long_case(dim=16))
    with torch.inference_mode():
        attention_fused(call, want, plan)
    assert_close(attention_fused(call, want, plan)[1], expected(call, want)[1], ties=near_ties(call))


def test_precision_setting_of_torch_is_put_back() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
    call, want, plan = build(long_case(dtype=torch.bfloat16))
    attention_fused(call, want, plan)
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # pyright: ignore[reportAttributeAccessIssue]


def test_fused_refuses_to_drop_a_gradient() -> None:
    call, want, plan = build(long_case())
    tracked = replace(call, query=call.query.clone().requires_grad_())
    with pytest.raises(UsageError, match="no gradient"):
        attention_fused(tracked, want, plan)
    with torch.no_grad():
        attention_fused(tracked, want, plan)
    attention_sweep(tracked, want)  # statistics never carry one


def test_misfits_are_named() -> None:
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 3, 5, 8)
    with pytest.raises(UsageError, match="4 query heads cannot share 3 key heads"):
        attention_fused(AttentionCall(query, key, key, 1.0), Want(frozenset()))
    call = AttentionCall(query, key[:, :2], key[:, :2], 1.0)
    with pytest.raises(UsageError, match="need `groups`"):
        attention_sweep(call, Want(frozenset({Stat.GROUP_MASS})))
    with pytest.raises(UsageError, match=r"groups is \(1, 2, 5\)"):
        attention_sweep(
            call, Want(frozenset({Stat.GROUP_MASS}), groups=torch.ones(1, 2, 5, dtype=torch.bool))
        )
    with pytest.raises(UsageError, match="needs `probes`"):
        attention_sweep(call, Want(frozenset({Stat.RECEIVED_ROWS})))
    with pytest.raises(UsageError, match=r"probes is \(1, 4\), expected \(1, 5\)"):
        attention_sweep(
            call, Want(frozenset({Stat.RECEIVED_ROWS}), probes=torch.ones(1, 4, dtype=torch.bool))
        )
    with pytest.raises(UsageError, match="at least one group"):
        attention_sweep(
            call,
            Want(frozenset({Stat.RECEIVED_BAND_REST}), groups=torch.ones(0, 1, 5, dtype=torch.bool)),
        )
