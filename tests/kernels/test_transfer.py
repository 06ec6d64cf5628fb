"""Moving attention mass beside a kernel equals rewriting the whole map."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sinklens.core.errors import UsageError
from sinklens.kernels.key_sets import Factors, KeySets, Rule, Shares, key_sets
from sinklens.kernels.reference import attention_reference, dense_logits, dense_visibility
from sinklens.kernels.shapes import sizes_of, visible_of
from sinklens.kernels.spec import AttentionCall, BlockPlan, Want
from sinklens.kernels.transfer import row_lse, transfer

from .calls import Case, build, cases
from .transferred import transferred_weights

NOTHING = Want(frozenset())


def dense_weights(call: AttentionCall) -> Tensor:
    """`A` `[batch head query key]` in float64; rows that see nothing are 0."""
    sizes = sizes_of(call, NOTHING)
    visible = dense_visibility(call, sizes)
    logits = dense_logits(call, sizes, visible)
    if call.learned_sinks is not None:
        sink = call.learned_sinks.double()[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], -1)
    weights = torch.softmax(logits, -1)[..., : sizes.keys]
    return torch.where(visible.any(-1, keepdim=True), weights, 0.0)


def mix(weights: Tensor, call: AttentionCall) -> Tensor:
    """Output `[batch query head value_dim]` of a map."""
    value = call.value.double().repeat_interleave(weights.shape[1] // call.value.shape[1], 1)
    return (weights @ value).transpose(1, 2)


def naive(weights: Tensor, groups: Tensor, factors: Tensor, divisor: Tensor, skip: Tensor) -> Tensor:
    """The edit, key by key: `A'[k] = c_g A[k] / D` in rows that are not skipped."""
    out = weights.clone()
    member = groups if groups.ndim == 4 else groups[:, :, None].expand(-1, -1, weights.shape[1], -1)
    for g in range(len(groups)):
        out = torch.where(member[g][:, :, None], weights * factors[..., g, None], out)
    out = out / divisor[..., None]
    return torch.where(skip[..., None], weights, out)


def disjoint(groups: Tensor) -> Tensor:
    """Sets without the keys of the sets before them."""
    seen, parts = torch.zeros_like(groups[0]), []
    for group in groups:
        parts.append(group & ~seen)
        seen = seen | group
    return torch.stack(parts)


def as_double(call: AttentionCall) -> AttentionCall:
    mask = call.mask
    if mask is not None and mask.dtype != torch.bool:
        # What hides a key in single precision is an ordinary number in double.
        mask = mask.double().masked_fill(~visible_of(mask), float("-inf"))
    sinks = None if call.learned_sinks is None else call.learned_sinks.double()
    return replace(
        call,
        query=call.query.double(),
        key=call.key.double(),
        value=call.value.double(),
        mask=mask,
        learned_sinks=sinks,
    )


def fixed_rule(factors: Tensor, divisor: float) -> Rule:
    """Factors that do not look at the masses."""

    def rule(shares: Shares) -> Factors:
        one = torch.ones_like(shares.rest)
        return Factors(factors.to(shares.mass), divisor * one, one > 0)

    return rule


def conserving(beta: float) -> Rule:
    """Every set times `beta`, what is freed to all others in proportion: as sharp as a rule can be."""

    def rule(shares: Shares) -> Factors:
        mass, others = shares.mass.sum(-1), shares.rest + shares.learned
        divisor = others / (others + (1.0 - beta) * mass)
        return Factors((beta * divisor)[..., None].expand_as(shares.mass), divisor, others > 1e-5)

    return rule


def prepared(case: Case) -> tuple[AttentionCall, Tensor, BlockPlan]:
    call, want, plan = build(case)
    assert want.groups is not None
    return replace(call, counted=None), disjoint(want.groups), plan


@given(cases(dtype=torch.float64), st.integers(0, 9))
def test_fixed_factors_in_double_precision(case, seed):
    call, groups, plan = prepared(case)
    call = as_double(call)
    torch.manual_seed(seed)
    factors, divisor = 3 * torch.rand(1, case.heads, 1, len(groups), dtype=torch.float64), 0.7
    weights = dense_weights(call)
    skip = torch.zeros_like(weights[..., 0], dtype=torch.bool)
    touched = (
        (weights[..., None, :] * per_head(groups, case).permute(1, 2, 0, 3)[:, :, None]).sum(-1) > 0
    ).any(-1)
    expected = naive(weights, groups, factors, torch.tensor(divisor, dtype=torch.float64), skip | ~touched)
    found = transfer(call, mix(weights, call), key_sets(groups), fixed_rule(factors, divisor), plan=plan)
    torch.testing.assert_close(found.output, mix(expected, call), rtol=0, atol=1e-12)
    moved = moved_by(weights, expected, call)
    torch.testing.assert_close(found.moved, moved, rtol=1e-9, atol=1e-9)
    assert int(found.rows) == int(touched.sum())


def per_head(groups: Tensor, case: Case) -> Tensor:
    return groups if groups.ndim == 4 else groups[:, :, None].expand(-1, -1, case.heads, -1)


def moved_by(before: Tensor, after: Tensor, call: AttentionCall) -> Tensor:
    """Half the change of every row, the learned sink's share included (it is divided like other keys)."""
    keys = (after - before).abs().sum(-1)
    seen = before.sum(-1) > 0
    learned = torch.where(seen, 1.0 - before.sum(-1), 0.0)
    if call.learned_sinks is None:
        return 0.5 * keys.sum()
    divisor = 0.7
    edited = keys > 0
    return 0.5 * (keys + torch.where(edited, learned * abs(1 / divisor - 1), 0.0)).sum()


@given(cases(), st.sampled_from([0.0, 0.3, 0.8]))
def test_masses_decide_and_strong_sets_do_not_cancel(case, beta):
    """Float32 to 1e-6 of the largest value, also where the sets hold nearly everything a row gives."""
    call, groups, plan = prepared(case)
    weights = dense_weights(call)
    member = per_head(groups, case).any(0)
    kernel = attention_reference(call, NOTHING)[0]
    found = transfer(call, kernel, key_sets(groups), conserving(beta), plan=plan)
    inside = torch.where(member[:, :, None], weights, 0.0)
    mass = inside.sum(-1)
    seen = weights.sum(-1) > 0
    rest = torch.where(member[:, :, None], 0.0, weights).sum(-1)
    learned = 0.0 if call.learned_sinks is None else torch.where(seen, 1.0 - mass - rest, 0.0)
    others = rest + learned
    edit = seen & (mass > 0) & (others > 1e-5)
    gain = ((others + (1 - beta) * mass) / others.clamp(min=1e-12))[..., None]
    expected = torch.where(edit[..., None], beta * inside + (weights - inside) * gain, weights)
    # Rows at the rule's own limit may fall to either side of it.
    clear = seen & ((others < 0.5e-5) | (others > 2e-5))
    wide = clear.transpose(1, 2)[..., None]
    worst = torch.where(wide, found.output.double() - mix(expected, call), 0.0).abs().max()
    assert float(worst) <= 1e-6 * max(1.0, float(call.value.abs().max()))


@given(cases(), st.sampled_from([0.25, 3.0]))
def test_the_dense_edit_of_a_map_says_the_same(case, gamma):
    call, groups, plan = prepared(case)
    weights, sets = dense_weights(call), key_sets(groups)
    factors = torch.full((1, 1, 1, len(groups)), gamma)

    def rule(shares: Shares) -> Factors:
        divisor = gamma * shares.mass.sum(-1) + shares.rest + shares.learned
        return Factors(factors.to(shares.mass), divisor, divisor > 0)

    dense = transferred_weights(weights, call, sets, rule)
    found = transfer(call, attention_reference(call, NOTHING)[0], sets, rule, plan=plan)
    atol = 1e-6 * max(1.0, float(call.value.abs().max()))
    torch.testing.assert_close(found.output.double(), mix(dense, call), rtol=0, atol=atol)
    if call.learned_sinks is None:
        seen = weights.sum(-1) > 0
        torch.testing.assert_close(dense.sum(-1)[seen], torch.ones_like(dense.sum(-1)[seen]))


@given(cases(dtype=torch.bfloat16))
def test_half_precision_is_wrong_by_rounding_only(case):
    """A knock-out in bfloat16, row by row as close to the exact one as storing it in bfloat16 allows."""
    call, groups, plan = prepared(case)
    weights = dense_weights(call)
    kernel = mix(weights, call).to(torch.bfloat16)
    found = transfer(call, kernel, key_sets(groups), conserving(0.0), plan=plan)
    sets = key_sets(groups)
    expected = mix(transferred_weights(weights, call, sets, conserving(0.0)), call)
    inside = torch.where(per_head(groups, case).any(0)[:, :, None], weights, 0.0).sum(-1)
    others = 1.0 - inside
    clear = ((others < 0.5e-5) | (others > 2e-5)).transpose(1, 2)[..., None]
    scale = max(1.0, float(call.value.abs().max()))
    error = torch.where(clear, found.output.double() - expected, 0.0).abs().max()
    assert float(error) <= 3 * 2**-8 * scale


@given(cases())
def test_factor_one_is_the_identity_bit_by_bit(case):
    call, groups, plan = prepared(case)
    output = attention_reference(call, NOTHING)[0]
    found = transfer(
        call, output, key_sets(groups), fixed_rule(torch.ones(1, 1, 1, len(groups)), 1.0), plan=plan
    )
    assert torch.equal(found.output, output)
    assert int(found.rows) == 0
    assert float(found.moved) == 0.0


@given(cases(queries=7, keys=37))
def test_only_the_rows_asked_for_change(case):
    call, groups, plan = prepared(case)
    rows = torch.rand(case.batch, case.queries) > 0.5
    output = attention_reference(call, NOTHING)[0]
    rule = fixed_rule(torch.full((1, 1, 1, len(groups)), 3.0), 1.3)
    whole = transfer(call, output, key_sets(groups), rule, plan=plan)
    some = transfer(call, output, key_sets(groups), rule, rows=rows, plan=plan)
    assert torch.equal(some.output[rows], whole.output[rows])
    assert torch.equal(some.output[~rows], output[~rows])


def test_a_row_may_keep_its_own_key():
    """Every key is a member, and the own one is not: only the diagonal is left after a knock-out."""
    torch.manual_seed(3)
    call = AttentionCall(torch.randn(2, 6, 7, 5), torch.randn(2, 3, 7, 5), torch.randn(2, 3, 7, 4), scale=0.4)
    sets = replace(key_sets(torch.ones(1, 2, 7, dtype=torch.bool)), keep_own=True)
    output = attention_reference(call, NOTHING)[0]
    found = transfer(call, output, sets, conserving(0.0))
    own = call.value.repeat_interleave(2, 1).transpose(1, 2)
    torch.testing.assert_close(found.output, own, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.output[:, 0], output[:, 0])
    assert int(found.again) > 0


def test_own_keys_are_found_where_the_cache_has_empty_room():
    """A static cache: the last key is not the row's own."""
    torch.manual_seed(4)
    mask = torch.zeros(1, 1, 1, 9, dtype=torch.bool)
    mask[..., :6] = True
    call = AttentionCall(
        torch.randn(1, 2, 1, 5), torch.randn(1, 1, 9, 5), torch.randn(1, 1, 9, 3), 0.5, mask=mask
    )
    sets = KeySets(
        torch.tensor([[[[2, 5]]]]), torch.ones(1, 1, 1, 2, dtype=torch.bool), True, torch.tensor([5])
    )
    found = transfer(call, attention_reference(call, NOTHING)[0], sets, conserving(0.0))
    hidden = mask.clone()
    hidden[..., 2] = False
    expected = attention_reference(replace(call, mask=hidden), NOTHING)[0]
    torch.testing.assert_close(found.output, expected, rtol=0, atol=1e-6)


def test_a_set_that_holds_everything_is_computed_again():
    """Mass 1 - 1e-4: subtraction alone would be wrong in the third digit."""
    torch.manual_seed(5)
    call = AttentionCall(torch.randn(1, 2, 11, 4), torch.randn(1, 2, 11, 4), torch.randn(1, 2, 11, 3), 0.5)
    bias = torch.zeros(1, 1, 11, 11)
    bias[..., 0] = 9.0
    call = replace(call, mask=bias.masked_fill(torch.ones(11, 11).tril() == 0, float("-inf")))
    groups = torch.zeros(1, 1, 11, dtype=torch.bool)
    groups[..., 0] = True
    found = transfer(call, attention_reference(call, NOTHING)[0], key_sets(groups), conserving(0.0))
    weights = dense_weights(call)
    expected = mix(transferred_weights(weights, call, key_sets(groups), conserving(0.0)), call)
    torch.testing.assert_close(found.output.double(), expected, rtol=0, atol=1e-6)
    assert int(found.again) == 22
    assert int(found.rows) == 20  # the first row has nothing else


def test_the_log_sum_exp_of_double_calls_is_double():
    torch.manual_seed(6)
    call = AttentionCall(
        torch.randn(1, 2, 5, 3).double(),
        torch.randn(1, 1, 5, 3).double(),
        torch.randn(1, 1, 5, 3).double(),
        0.5,
        learned_sinks=torch.randn(2).double(),
    )
    weights = dense_weights(call)
    logits = dense_logits(call, sizes_of(call, NOTHING), dense_visibility(call, sizes_of(call, NOTHING)))
    torch.testing.assert_close(torch.exp(logits - row_lse(call)[..., None]), weights, rtol=0, atol=1e-14)


def test_long_sequences_need_no_map():
    """A block of rows at a time gives what one block gives, and at most `scores` numbers are in flight."""
    torch.manual_seed(7)
    call = AttentionCall(torch.randn(1, 3, 301, 4), torch.randn(1, 1, 301, 4), torch.randn(1, 1, 301, 5), 0.5)
    groups = torch.rand(2, 1, 3, 301) > 0.97
    sets = key_sets(disjoint(groups))
    output = attention_reference(call, NOTHING)[0]
    whole = transfer(call, output, sets, conserving(0.1), plan=BlockPlan(scores=10**9))
    parts = transfer(call, output, sets, conserving(0.1), plan=BlockPlan(scores=2000))
    torch.testing.assert_close(parts.output, whole.output, rtol=0, atol=1e-6)
    assert int(parts.rows) == int(whole.rows) > 0


def test_misfits_are_named_together():
    call = AttentionCall(torch.randn(2, 4, 7, 3), torch.randn(2, 2, 7, 3), torch.randn(2, 2, 7, 5), 0.5)
    sets = KeySets(torch.zeros(1, 3, 1, 1, dtype=torch.long), torch.ones(1, 3, 1, 1, dtype=torch.bool))
    with pytest.raises(UsageError) as caught:
        transfer(call, torch.randn(2, 7, 4, 3), sets, conserving(0.5))
    assert str(caught.value) == (
        "The key sets do not fit this attention call.\n"
        "output is (2, 7, 4, 3), expected (batch query head value_dim) = (2, 7, 4, 5); "
        "columns are (1, 3, 1, 1), expected (2, 1 or 4, group, width)."
    )


def test_a_gradient_is_refused():
    call = AttentionCall(
        torch.randn(1, 1, 2, 3, requires_grad=True), torch.randn(1, 1, 2, 3), torch.randn(1, 1, 2, 3), 1.0
    )
    with pytest.raises(UsageError, match="no gradient"):
        transfer(call, torch.randn(1, 2, 1, 3), key_sets(torch.ones(1, 1, 2) > 0), conserving(0.5))
