"""The log-sum-exp of the model's own kernel: caught where it is that of the call, refused on doubt."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sinklens.kernels.blocked import attention_sweep
from sinklens.kernels.capture import captured_lse
from sinklens.kernels.spec import AttentionCall, Stat, Want

from .calls import ALL, assert_close, expected, near_ties, true_lse

STATS = Want(
    ALL - {Stat.GROUP_MASS, Stat.GROUP_OUTPUT, Stat.RECEIVED_BAND_REST, Stat.RECEIVED_ROWS}, band=(1, 4)
)


def call_of(queries: int = 11, keys: int = 11, **more: Any) -> AttentionCall:
    shape = {"query": (2, 6, queries, 16), "key": (2, 3, keys, 16), "value": (2, 3, keys, 16)}
    return AttentionCall(**{name: torch.randn(size) for name, size in shape.items()}, scale=0.3, **more)


def own_kernel(call: AttentionCall) -> torch.Tensor:
    """transformers' function, with its repetition and packing of heads."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module: Any = SimpleNamespace(
        num_key_value_groups=call.query.shape[1] // call.key.shape[1], is_causal=True
    )
    return sdpa_attention_forward(
        module, call.query, call.key, call.value, call.mask, scaling=call.scale, is_causal=call.causal
    )[0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("kind", ["causal", "bidirectional", "boolean", "additive", "hidden row"])
def test_caught_value_is_that_of_the_call(mode: Callable[[], AbstractContextManager[Any]], kind: str) -> None:
    mask = None
    if kind in ("boolean", "hidden row"):
        mask = torch.rand(2, 1, 11, 11) > 0.4
        mask[..., 0] = True
        mask[1, 0, 5] = kind == "boolean"
    if kind == "additive":
        mask = torch.randn(2, 1, 11, 11).masked_fill(
            torch.rand(2, 1, 11, 11) > 0.8, torch.finfo(torch.float32).min
        )
    call = call_of(mask=mask, causal=kind == "causal")
    with mode():
        before = own_kernel(call)
        with captured_lse() as captured:
            output = own_kernel(call)
        lse = captured.lse_for(call)
    assert torch.equal(output, before)
    assert lse is not None
    seen = expected(call, STATS)[1].rows
    assert seen is not None
    torch.testing.assert_close(
        torch.where(seen[:, None], lse, 0.0),
        torch.where(seen[:, None], true_lse(call), 0.0),
        atol=2e-6,
        rtol=0,
    )
    assert_close(
        attention_sweep(call, STATS, lse), expected(call, STATS)[1], ties=near_ties(call), bound=3e-6
    )


def test_packed_heads_of_a_decoded_row_are_unpacked() -> None:
    call = call_of(queries=1, keys=13, mask=torch.rand(2, 1, 1, 13) > 0.3)
    with torch.no_grad(), captured_lse() as captured:
        own_kernel(call)
    assert captured.lse is not None
    assert captured.lse.shape == (2, 3, 2)
    lse = captured.lse_for(call)
    assert lse is not None
    torch.testing.assert_close(lse, true_lse(call), atol=2e-6, rtol=0)


def test_refused_on_doubt() -> None:
    call = call_of()
    key, value = (tensor.repeat_interleave(2, 1) for tensor in (call.key, call.value))

    def run(*, scale: float = 0.3, is_causal: bool = True, **more: Any) -> None:
        F.scaled_dot_product_attention(call.query, key, value, scale=scale, is_causal=is_causal, **more)

    def caught(*runs: Callable[[], object]) -> torch.Tensor | None:
        with torch.no_grad(), captured_lse() as captured:
            for each in runs:
                each()
        return captured.lse_for(call)

    assert caught(run) is not None
    assert caught() is None  # nothing ran
    assert caught(run, run) is None  # whose is it?
    assert caught(run, lambda: torch.softmax(call.query, -1)) is None  # an eager attention beside it
    assert caught(lambda: run(scale=0.4)) is None
    assert caught(lambda: run(is_causal=False)) is None
    assert caught(lambda: run(is_causal=False, attn_mask=torch.ones(11, 11).tril().bool())) is None
    other = call_of(queries=7)
    with torch.no_grad(), captured_lse() as captured:
        run()
    assert captured.lse_for(other) is None  # another number of rows
    assert captured.lse_for(call_of(softcap=2.0)) is None
    assert captured.lse_for(call_of(learned_sinks=torch.randn(6))) is None


def test_kernels_without_a_log_sum_exp_give_none() -> None:
    query, key, value = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 3)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), captured_lse() as captured:
            F.scaled_dot_product_attention(query, key, value)  # narrower values: the math kernel
        assert captured.lse is None
