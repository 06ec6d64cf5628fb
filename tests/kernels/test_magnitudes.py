"""Order statistics of magnitudes against plain sorting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sinklens.kernels.magnitudes import largest_magnitudes, lower_median_magnitude


@given(st.integers(1, 23), st.integers(1, 19), st.integers(1, 40), st.integers(0, 2**16), st.booleans())
def test_the_largest_entries_are_those_of_a_full_sort(
    pos: int, dim: int, count: int, seed: int, ties: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(pos, dim, generator=generator)
    if ties:
        x = (x * 2).round()
    found = largest_magnitudes(x, count)
    order = torch.sort(x.abs().flatten(), descending=True, stable=True).indices[:count]
    assert torch.equal(found.pos * dim + found.dim, order)
    assert torch.equal(found.value, x.flatten()[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (7, 13), (64, 33), (501, 97)])
def test_the_median_is_the_lower_one_of_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert lower_median_magnitude(x) == float(x.float().abs().median())


def test_inputs_are_left_as_they_are() -> None:
    x = torch.randn(31, 17, generator=torch.Generator().manual_seed(3)).t()
    before = x.clone()
    lower_median_magnitude(x)
    largest_magnitudes(x, 5)
    assert torch.equal(x, before)
