"""NaN and infinity are found in what was read, wherever they are."""

from __future__ import annotations

import pytest
import torch

from sinklens.models.streaming.tensors import _LOOKED_AT, NUMBERS, only_finite


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
@pytest.mark.parametrize("size", [1, 5, _LOOKED_AT - 1, _LOOKED_AT, _LOOKED_AT + 1, 3 * _LOOKED_AT + 7])
def test_as_torch_tells(dtype: torch.dtype, size: int) -> None:
    random = torch.randn(size, dtype=torch.float64).to(dtype)
    random[size // 3] = torch.finfo(dtype).max
    random[size // 2] = -torch.finfo(dtype).smallest_normal / 2
    assert only_finite(random)
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in {0, size // 2, size - 1}:
            wrong = random.clone()
            wrong[place] = bad
            assert not only_finite(wrong), (bad, place)


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_every_shape(dtype: torch.dtype) -> None:
    assert only_finite(torch.empty(0, dtype=dtype))
    assert only_finite(torch.tensor(-1.5, dtype=dtype))
    table = torch.zeros(3, 7, dtype=dtype)
    assert only_finite(table.T)
    table[2, 6] = float("nan")
    assert not only_finite(table.T[5:])
    assert only_finite(table.T[:5])
