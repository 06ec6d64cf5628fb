"""Weights without their denominator: right wherever logits lie, and taken off their largest only where they must be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinklens.kernels import powers
from sinklens.kernels.block import row_argmax
from sinklens.kernels.blocked import attention_fused
from sinklens.kernels.scores import Scores
from sinklens.kernels.spec import AttentionCall, BlockPlan, Stat, Want

from .calls import ALL, assert_close, build, cases, expected, near_ties, output_error

TORCH = BlockPlan(scores=4000, native=False)
SINKS = torch.tensor([0.5, -1.0, 2.0, 40.0, -40.0, 0.0])


def call_at(offset: float, spread: float, **changes: object) -> AttentionCall:
    """A call whose logits are about `offset`, give or take `spread`: the last width is the same for all keys."""
    generator = torch.Generator().manual_seed(7)
    query, key = (torch.randn(2, heads, 53, 9, generator=generator) for heads in (6, 2))
    query[..., :-1] *= spread / 3.0
    query[..., -1], key[..., -1] = offset, 1.0
    value = torch.randn(2, 2, 53, 5, generator=generator)
    return replace(AttentionCall(query, key, value, 1.0), **changes)


@pytest.mark.parametrize(
    "stats", [ALL, frozenset({Stat.RECEIVED, Stat.TOP1, Stat.GROUP_MASS, Stat.DIAGONAL})]
)
@pytest.mark.parametrize("sinks", [None, SINKS])
@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("offset", [-1000.0, -80.0, -27.0, 0.0, 27.0, 80.0, 1000.0])
def test_logits_may_lie_anywhere(
    offset: float, spread: float, sinks: torch.Tensor | None, stats: frozenset[Stat]
) -> None:
    padding = torch.ones(2, 1, 53, 53, dtype=torch.bool).tril()
    padding[1, :, :, :11] = False
    for mask in (None, padding):
        sinks_there = None if sinks is None else sinks + offset
        call = call_at(offset, spread, mask=mask, learned_sinks=sinks_there)
        groups = torch.zeros(2, 2, 53, dtype=torch.bool)
        groups[0, :, 12] = True
        want = Want(stats, groups=groups, probes=torch.arange(106).view(2, 53) % 3 == 0)
        true_output, truth = expected(call, want)
        output, found = attention_fused(call, want, TORCH)
        # Logits are rounded where they lie, by the product already.
        bound = 2e-6 * max(1.0, (abs(offset) + spread) / 8)
        assert output_error(output, true_output, call) < bound
        assert_close(found, truth, ties=near_ties(call) + (54 if abs(offset) > 500 else 0), bound=bound)


@settings(max_examples=40)
@given(cases(), st.sampled_from([1e-3, 30.0, 300.0]))
def test_any_call_with_any_scale(case: object, scale: float) -> None:
    call, want, plan = build(case)  # pyright: ignore[reportArgumentType]
    call = replace(call, scale=call.scale * scale)
    true_output, truth = expected(call, want)
    output, found = attention_fused(call, want, replace(plan, native=False))
    bound = 2e-6 * max(1.0, scale)
    assert output_error(output, true_output, call) < bound
    assert_close(found, truth, ties=near_ties(call) + (2 if scale > 1 else 0), bound=bound)


def test_the_largest_is_taken_off_only_once_it_has_to_be() -> None:
    """Logits are made twice for the first block that needs it, and once for all others."""
    made: list[slice] = []

    class Counted(Scores):
        def block(self, rows: slice, keys: slice) -> torch.Tensor:
            made.append(rows)
            return super().block(rows, keys)

    def walk(offset: float) -> list[int]:
        made.clear()
        blocks = powers.Powers(
            Counted(call_at(offset, 1.0), TORCH, base=2.0),
            None,
            apart=False,
            peaks=(False, False),
            normed=False,
            normalised=False,
        )
        for start in (36, 18, 0):
            block = blocks.block(slice(start, start + 17), slice(0, 53))
            assert block.inverse is not None
            torch.testing.assert_close(
                block.weights.sum(-1) * block.inverse, torch.ones(2, 6, 17), atol=1e-6, rtol=0
            )
        return [rows.start for rows in made]

    assert walk(5.0) == [36, 18, 0]
    assert walk(100.0) == [36, 36, 18, 0]
    assert walk(-100.0) == [36, 36, 18, 0]


@pytest.mark.parametrize("keys", [1, 63, 255, 256, 300, 384, 1000])
def test_the_first_of_the_largest(keys: int) -> None:
    generator = torch.Generator().manual_seed(keys)
    fine = torch.rand(2, 3, 7, keys, generator=generator)
    tied = torch.randint(0, 4, (2, 3, 7, keys), generator=generator).float()
    for weights in (fine, tied, torch.zeros(2, 3, 7, keys)):
        first = torch.from_numpy(weights.numpy().argmax(-1))
        assert torch.equal(row_argmax(weights), first)
