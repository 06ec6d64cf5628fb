"""The Triton kernels on a CUDA device equal the definition; run by `test_triton.py`, alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sinklens.kernels import triton_pass
from sinklens.kernels.blocked import attention_fused, attention_sweep
from sinklens.kernels.spec import AttentionCall, Want

from .calls import MASKS, Case, assert_close, build, expected, near_ties, output_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

OUTPUT_BOUND = {torch.float32: 5e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def on_device(call: AttentionCall, want: Want) -> tuple[AttentionCall, Want]:
    def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.cuda()

    fields = ("query", "key", "value", "mask", "learned_sinks", "counted")
    call = replace(call, **{name: moved(getattr(call, name)) for name in fields})
    return call, replace(want, groups=moved(want.groups), probes=moved(want.probes))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "softcap"), [(64, None), (128, None), (80, 30.0), (256, None)])
def test_kernels_on_the_device(mask: str, dtype: torch.dtype, dim: int, softcap: float | None) -> None:
    case = Case(2, 2, 3, 331, 331, dim, dim, mask, softcap, True, True, True, "few", 1, 3, dtype)
    call, want = on_device(*build(case)[:2])
    want = replace(want, stats=triton_pass.SERVED)
    assert triton_pass.serves(call, want)
    true_output, truth = expected(call, want)
    output, found = attention_fused(call, want)
    assert output_error(output, true_output, call) <= OUTPUT_BOUND[dtype]
    assert_close(found, truth, ties=near_ties(call), bound=5e-6)
    again = attention_sweep(call, want)
    assert_close(again, truth, ties=near_ties(call), bound=5e-6)
    for stat, value in attention_sweep(call, want).values.items():
        assert torch.equal(value, again[stat]), stat  # the same to the last bit, whatever the schedule
