"""What the statistics must satisfy by their meaning, checked on the reference and on the blocked kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from sinklens.kernels.blocked import attention_fused, attention_sweep
from sinklens.kernels.reference import attention_reference
from sinklens.kernels.spec import AttentionCall, AttentionStatistics, BlockPlan, Stat, Want

from .calls import Case, build, cases

Kernel = Callable[[AttentionCall, Want], AttentionStatistics]
SMALL = BlockPlan(scores=700, native=False)


def _reference(call: AttentionCall, want: Want) -> AttentionStatistics:
    return attention_reference(call, want)[1]


def _fused(call: AttentionCall, want: Want) -> AttentionStatistics:
    return attention_fused(call, want, SMALL)[1]


def _sweep(call: AttentionCall, want: Want) -> AttentionStatistics:
    return attention_sweep(call, want, None, SMALL)


def _native(call: AttentionCall, want: Want) -> AttentionStatistics:
    return attention_fused(call, want, replace(SMALL, native=True))[1]


kernels = pytest.mark.parametrize("kernel", [_reference, _fused, _sweep, _native])


@kernels
@settings(max_examples=20)
@given(case=cases(mask="causal"))
def test_received_sums_to_counted_rows_less_learned_sink_mass(kernel: Kernel, case: Case) -> None:
    call, want, _ = build(case)
    found = kernel(call, want)
    assert found.rows is not None
    mass = found.rows.sum(1)[:, None] - found[Stat.LEARNED_SINK].sum(-1)
    torch.testing.assert_close(found[Stat.RECEIVED].sum(-1), mass.float(), atol=1e-4, rtol=1e-5)


@kernels
@settings(max_examples=20)
@given(case=cases(sinks=False))
def test_all_keys_together_have_mass_one_and_write_the_output(kernel: Kernel, case: Case) -> None:
    call, want, _ = build(replace(case, counted=False))
    everything = torch.ones(1, case.batch, case.keys, dtype=torch.bool)
    found = kernel(call, replace(want, groups=everything))
    sees = attention_reference(call, Want(frozenset({Stat.ROW_MAX})))[1][Stat.ROW_MAX] > 0
    torch.testing.assert_close(found[Stat.GROUP_MASS][..., 0], sees.float(), atol=1e-5, rtol=0)
    output = attention_reference(call, want)[0].transpose(1, 2)
    torch.testing.assert_close(found[Stat.GROUP_OUTPUT][..., 0, :], output, atol=1e-5, rtol=0)


@kernels
@settings(max_examples=15)
@given(case=cases(mask="causal", softcap=None, sinks=False))
def test_decoding_a_row_equals_the_last_row_of_prefill(kernel: Kernel, case: Case) -> None:
    call, want, _ = build(replace(case, counted=False, queries=case.keys))
    whole = kernel(call, want)
    assert want.probes is not None
    last = kernel(replace(call, query=call.query[:, :, -1:]), replace(want, probes=want.probes[:, -1:]))
    for stat in (Stat.DIAGONAL, Stat.ENTROPY, Stat.DISTANCE, Stat.ROW_MAX, Stat.LSE, Stat.GROUP_MASS):
        torch.testing.assert_close(last[stat][:, :, 0], whole[stat][:, :, -1], atol=1e-5, rtol=0)
    assert last.visible is not None
    assert torch.equal(last.visible, torch.ones_like(last.visible))


@kernels
@settings(max_examples=15)
@given(case=cases(mask="causal", counted=False))
def test_chunks_of_rows_add_up(kernel: Kernel, case: Case) -> None:
    call, want, _ = build(replace(case, queries=case.keys))
    middle = case.keys // 2
    if middle == 0:
        return
    early = replace(
        call, query=call.query[:, :, :middle], key=call.key[:, :, :middle], value=call.value[:, :, :middle]
    )
    late = replace(call, query=call.query[:, :, middle:])
    want = Want(frozenset({Stat.RECEIVED, Stat.RECEIVED_SQUARED, Stat.RECEIVED_LOG, Stat.TOP1}))
    whole, first, second = kernel(call, want), kernel(early, want), kernel(late, want)
    for stat in want.stats - {Stat.TOP1}:
        total = second[stat].clone()
        total[..., :middle] += first[stat]
        torch.testing.assert_close(total, whole[stat], atol=1e-5, rtol=1e-5)


@kernels
def test_uniform_attention_has_its_closed_form(kernel: Kernel) -> None:
    """Equal logits: `alpha_k = (H_T - H_k) / (T - k)` with harmonic numbers H, entropy `ln(q + 1)`."""
    length = 61
    zero, value = torch.zeros(1, 2, length, 8), torch.randn(1, 1, length, 3)
    call = AttentionCall(zero, torch.randn(1, 1, length, 8), value, 0.3)
    found = kernel(
        call, Want(frozenset({Stat.RECEIVED, Stat.ENTROPY, Stat.DISTANCE, Stat.ROW_MAX, Stat.TOP1}))
    )
    harmonic = torch.cat([torch.zeros(1), (1 / torch.arange(1, length + 1)).cumsum(0)])
    count = torch.arange(length, 0, -1)
    assert found.visible is not None
    assert torch.equal(found.visible[0, 0], count)
    alpha = (harmonic[length] - harmonic[:-1]) / count
    torch.testing.assert_close(found[Stat.RECEIVED][0, 1] / count, alpha, atol=1e-6, rtol=0)
    row = torch.arange(length)
    torch.testing.assert_close(found[Stat.ENTROPY][0, 0], (row + 1).float().log(), atol=2e-6, rtol=0)
    torch.testing.assert_close(found[Stat.DISTANCE][0, 0], row / 2, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[Stat.ROW_MAX][0, 0], 1 / (row + 1), atol=1e-6, rtol=0)
    # All keys tie, so every row's vote is for the first.
    assert found[Stat.TOP1][0, 0].tolist() == [length] + [0] * (length - 1)


@kernels
@pytest.mark.parametrize(
    "length", [389, 448, 512]
)  # long enough to be searched in pieces: uneven, of 64, of 128
def test_ties_are_won_by_the_first_key_in_long_rows(kernel: Kernel, length: int) -> None:
    key = torch.randn(1, 1, length, 8, generator=torch.Generator().manual_seed(5))
    key[:, :, [70, 71, 200, 388]] = 3 * torch.ones(8)
    query = torch.ones(1, 1, length, 8)
    call = AttentionCall(query, key, key, 1.0)
    votes = kernel(call, Want(frozenset({Stat.TOP1})))[Stat.TOP1][0, 0]
    assert votes[70] == length - 70
    assert votes[[71, 200, 388]].sum() == 0


@kernels
@settings(max_examples=15)
@given(case=cases())
def test_permuting_heads_permutes_results(kernel: Kernel, case: Case) -> None:
    call, want, _ = build(replace(case, groups="one key"))
    order = torch.randperm(case.kv_heads)
    heads = (order[:, None] * case.group + torch.arange(case.group)).flatten()

    def by_head(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or tensor.shape[1] == 1 else tensor[:, heads]

    sinks = None if call.learned_sinks is None else call.learned_sinks[heads]
    moved = replace(
        call,
        query=call.query[:, heads],
        key=call.key[:, order],
        value=call.value[:, order],
        mask=by_head(call.mask),
        learned_sinks=sinks,
    )
    before, after = kernel(call, want), kernel(moved, want)
    for stat in want.stats:
        # A distance is a row's place less a mean of places, each of which is rounded.
        rounding = 2 * torch.finfo(torch.float32).eps * max(case.queries, case.keys)
        atol = max(1e-6, rounding) if stat is Stat.DISTANCE else 1e-6
        torch.testing.assert_close(after[stat], before[stat][:, heads], atol=atol, rtol=1e-5)


@kernels
def test_padding_never_enters(kernel: Kernel) -> None:
    """Left padding by mask and by `counted` gives, on the real positions, what the unpadded call gives."""
    length, pad = 19, 6
    query, key, value = (
        torch.randn(1, 6, length, 8),
        torch.randn(1, 2, length, 8),
        torch.randn(1, 2, length, 5),
    )
    stats = frozenset(Stat) - {Stat.GROUP_MASS, Stat.GROUP_OUTPUT}
    first, probes = torch.arange(length) == 0, torch.rand(1, length) > 0.5
    want = Want(stats, tail=4, groups=first[None, None], probes=probes, band=(2, 7))
    plain = kernel(AttentionCall(query, key, value, 0.4), want)

    def padded(tensor: Tensor) -> Tensor:
        return torch.cat([torch.randn(*tensor.shape[:2], pad, tensor.shape[3]), tensor], 2)

    real = torch.arange(length + pad) >= pad
    mask = (torch.ones(length + pad, length + pad).tril().bool() & real)[None, None]
    call = AttentionCall(padded(query), padded(key), padded(value), 0.4, mask=mask, counted=real[None])
    pad_ = torch.nn.functional.pad
    wide = replace(want, groups=pad_(first, (pad, 0))[None, None], probes=pad_(probes, (pad, 0), value=True))
    found = kernel(call, wide)
    for stat in stats:
        torch.testing.assert_close(found[stat][..., pad:], plain[stat], atol=2e-6, rtol=1e-5)
        assert not found[stat][..., :pad].any()
    assert found.visible is not None
    assert plain.visible is not None
    assert torch.equal(found.visible[..., pad:], plain.visible)


@kernels
def test_a_row_that_sees_nothing_is_zero_everywhere(kernel: Kernel) -> None:
    mask = torch.ones(1, 1, 7, 5, dtype=torch.bool)
    mask[0, 0, 3] = False
    query, key = torch.randn(1, 2, 7, 4), torch.randn(1, 2, 5, 4)
    call = AttentionCall(query, key, key, 1.0, mask=mask, learned_sinks=torch.randn(2))
    groups, probes = torch.ones(1, 1, 5, dtype=torch.bool), torch.ones(1, 7, dtype=torch.bool)
    found = kernel(call, Want(frozenset(Stat), groups=groups, probes=probes))
    assert found.rows is not None
    assert found.rows.tolist() == [[True, True, True, False, True, True, True]]
    for stat, value in found.values.items():
        if value.shape[2] == 7:
            assert not value[:, :, 3].any(), stat
    assert found[Stat.TOP1].sum() == 2 * 6


@kernels
def test_entropy_of_equal_weights_is_all_that_the_keys_allow(kernel: Kernel) -> None:
    """Also behind a sliding window, where rows see fewer keys than stand before them."""
    length, window = 43, 5
    zero = torch.zeros(1, 3, length, 8)
    mask = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)
    for call in (
        AttentionCall(zero, zero, zero, 1.0),
        AttentionCall(zero, zero, zero, 1.0, mask=mask[None, None]),
    ):
        found = kernel(call, Want(frozenset({Stat.ENTROPY_NORMALISED})))[Stat.ENTROPY_NORMALISED]
        assert not found[..., 0].any()
        torch.testing.assert_close(found[..., 1:], torch.ones_like(found[..., 1:]), atol=2e-6, rtol=0)


@kernels
def test_band_without_the_first_group_is_attention_without_those_keys(kernel: Kernel) -> None:
    """Taking a key out and renormalising is attention that never saw it: here as a mask."""
    length, gone = 31, 3
    query, key = torch.randn(1, 4, length, 8), torch.randn(1, 2, length, 8)
    key[:, :, gone] *= 2.5  # most goes to it, in some rows, but every row keeps enough to count
    triangle = torch.ones(length, length, dtype=torch.bool).tril()
    group = torch.arange(length) == gone
    want = Want(
        frozenset({Stat.RECEIVED_BAND, Stat.RECEIVED_BAND_REST}), groups=group[None, None], band=(2, 9)
    )
    call = AttentionCall(query, key, key, 0.7, mask=triangle[None, None])
    found = kernel(call, want)
    mass = replace(want, stats=frozenset({Stat.GROUP_MASS}))
    assert bool((attention_reference(call, mass)[1][Stat.GROUP_MASS] < 1 - 2e-4).all())
    without = kernel(AttentionCall(query, key, key, 0.7, mask=(triangle & ~group)[None, None]), want)
    rest = found[Stat.RECEIVED_BAND_REST]
    torch.testing.assert_close(rest, without[Stat.RECEIVED_BAND], atol=1e-5, rtol=1e-5)
    assert not rest[..., gone].any()
    assert not rest[..., length - 2 :].any()
    assert found[Stat.RECEIVED_BAND][..., gone].max() > rest.max()


@kernels
def test_rows_that_leave_nearly_nothing_have_no_part_in_the_rest(kernel: Kernel) -> None:
    """Rows leave 10^-1 to 10^-12 beside the first key: from 2e-4 on they count in full, up to 1e-4 not at all."""
    length = 37
    left = torch.cat([torch.logspace(-1, -12, length - 1), torch.tensor([1.5e-4])]).double()
    uniform = left / torch.arange(length).clamp(min=1)
    # Query 0's two coordinates make the logits: ln((1 - left) / each of the others) on the first key, 0 elsewhere.
    query = ((1 - left) / uniform).log()[None, None, :, None].float().expand(1, 3, -1, 2).contiguous()
    key = torch.zeros(1, 1, length, 2)
    key[0, 0, 0, 0] = 1.0
    want = Want(
        frozenset({Stat.RECEIVED_BAND_REST}), groups=(torch.arange(length) == 0)[None, None], band=(1, 40)
    )
    found = kernel(AttentionCall(query, key, key, 1.0), want)[Stat.RECEIVED_BAND_REST]
    part = (left / 1e-4 - 1).clamp(0, 1)
    expected = [sum(float(part[q]) / q for q in range(k + 1, length)) if k else 0.0 for k in range(length)]
    torch.testing.assert_close(found[0, 1], torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert found[0, 1, 1] > 1
    assert found[0, 1, 20] == pytest.approx(0.5 / (length - 1), abs=1e-4)


@kernels
def test_sums_over_chosen_rows_add_up(kernel: Kernel) -> None:
    length = 29
    query, key = torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8)
    counted = torch.rand(2, length) > 0.3
    probes = torch.rand(2, length) > 0.5
    call = AttentionCall(query, key, key, 0.5, counted=counted)
    asked = Want(frozenset({Stat.RECEIVED, Stat.RECEIVED_ROWS}), probes=probes)
    some, others = kernel(call, asked), kernel(call, replace(asked, probes=~probes))
    total = some[Stat.RECEIVED_ROWS] + others[Stat.RECEIVED_ROWS]
    torch.testing.assert_close(total, some[Stat.RECEIVED], atol=1e-5, rtol=1e-5)
    only = kernel(replace(call, counted=counted & probes), asked)
    torch.testing.assert_close(some[Stat.RECEIVED_ROWS], only[Stat.RECEIVED], atol=1e-5, rtol=1e-5)


def test_mass_transfer_from_groups_is_exact() -> None:
    """`o + Σ_g (c_g − 1) o_g`, over the scaled masses' sum, is attention with edited weights."""
    torch.manual_seed(3)
    length, heads = 23, 4
    query, key, value = (
        torch.randn(2, heads, length, 8),
        torch.randn(2, 2, length, 8),
        torch.randn(2, 2, length, 5),
    )
    groups = torch.zeros(2, 2, length, dtype=torch.bool)
    groups[0, :, 0] = True
    groups[1, 0, 4:9] = groups[1, 1, 11:13] = True
    call = AttentionCall(query, key, value, 0.5)
    output, found = attention_fused(
        call, Want(frozenset({Stat.GROUP_MASS, Stat.GROUP_OUTPUT}), groups=groups), SMALL
    )
    factor = torch.tensor([0.25, 3.0])
    divisor = 1 + (found[Stat.GROUP_MASS] * (factor - 1)).sum(-1)
    edited = output.transpose(1, 2) + (found[Stat.GROUP_OUTPUT] * (factor - 1)[:, None]).sum(-2)
    edited = edited / divisor[..., None]

    logits = query @ key.repeat_interleave(2, 1).mT * 0.5
    weights = logits.masked_fill(~torch.ones(length, length).tril().bool(), float("-inf")).softmax(-1)
    scale = torch.where(groups[0], factor[0], torch.where(groups[1], factor[1], 1.0))
    weights = weights * scale[:, None, None]
    truth = weights / weights.sum(-1, keepdim=True) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(edited, truth, atol=1e-6, rtol=1e-6)
