"""No kernel makes a tensor of `query x key` elements, whatever is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sinklens.kernels.blocked import attention_fused, attention_sweep
from sinklens.kernels.spec import AttentionCall, BlockPlan, Stat, Want
from sinklens.kernels.workspace import Workspace, workspace

from .calls import ALL, true_lse

LENGTH, HEADS, SCORES = 509, 4, 20_000


class Largest(TorchDispatchMode):
    """Remembers the most elements of memory behind any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, torch.Tensor) and not func.is_view:
                self.elements = max(self.elements, item.numel())
        return result


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["fused", "sweep", "sweep with lse"])
def test_largest_tensor_is_a_block(kind: str, masked: bool) -> None:
    query, key = torch.randn(1, HEADS, LENGTH, 8), torch.randn(1, 2, LENGTH, 8)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().triu(-100)[None, None] if masked else None
    call = AttentionCall(query, key, key, 0.3, mask=mask)
    probes = torch.rand(1, LENGTH) > 0.5
    want = Want(ALL - {Stat.GROUP_OUTPUT}, groups=torch.rand(3, 1, LENGTH) > 0.5, probes=probes)
    lse = true_lse(call) if kind == "sweep with lse" else None
    workspace().release()
    with Largest() as largest:
        if kind == "fused":
            attention_fused(call, want, BlockPlan(scores=SCORES))
        else:
            attention_sweep(call, want, lse, BlockPlan(scores=SCORES))
    # Queries and keys themselves have LENGTH * HEADS * 8 < SCORES elements; the map of one head has 259 081.
    assert 0 < largest.elements <= SCORES


def test_memory_is_linear_in_length() -> None:
    def held(length: int) -> int:
        query, key = torch.randn(1, HEADS, length, 8), torch.randn(1, 2, length, 8)
        workspace().release()
        attention_fused(
            AttentionCall(query, key, key, 0.3), Want(frozenset({Stat.RECEIVED})), BlockPlan(scores=1)
        )
        return workspace().bytes

    assert held(1024) < 2.2 * held(512)


def test_workspace_grows_is_reused_and_is_released() -> None:
    space, cpu = Workspace(), torch.device("cpu")
    first = space.take("a", (3, 5), torch.float32, cpu)
    assert space.take("a", (2, 7), torch.float32, cpu).data_ptr() == first.data_ptr()
    assert space.take("b", (3, 5), torch.float32, cpu).data_ptr() != first.data_ptr()
    assert space.take("a", (4, 5), torch.float32, cpu).shape == (4, 5)
    assert space.bytes == (20 + 15) * 4
    space.release()
    assert space.bytes == 0
