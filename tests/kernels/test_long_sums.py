"""Sums over very many rows are as exact as what they add."""

from __future__ import annotations

import math

import pytest
import torch

from sinklens.kernels.blocked import attention_sweep
from sinklens.kernels.spec import AttentionCall, BlockPlan, Stat, Want


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_a_long_sum_of_nearly_equal_weights_keeps_their_digits(known: bool, native: bool) -> None:
    """The first key has more than 0.999 of every row; added one by one in float32, the sums would drift."""
    length, logit = 16_384, 8.1 + math.log(16_384)
    query, key = torch.zeros(1, 1, length, 2), torch.zeros(1, 1, length, 2)
    query[..., 0], key[0, 0, 0, 0] = 1.0, logit
    exact = key[0, 0, 0, 0].double().exp()
    norm = (exact + torch.arange(length)).log()
    lse = norm.float()[None, None] if known else None
    want, plan = Want(frozenset({Stat.RECEIVED})), BlockPlan(native=native)
    found = attention_sweep(AttentionCall(query, key, key, 1.0), want, lse, plan)
    truth = (exact.log() - norm).exp().sum()
    assert abs(float(found[Stat.RECEIVED][0, 0, 0]) / float(truth) - 1) < 1.2e-5
