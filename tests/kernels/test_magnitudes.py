"""Order statistics of magnitudes against plain sorting."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sinklens.kernels.magnitudes import largest_magnitudes, lower_median_magnitude, lower_medians


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


@given(
    st.integers(1, 23),
    st.integers(1, 19),
    st.integers(0, 2**16),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_medians_of_columns_are_those_of_torch(
    rows: int, columns: int, seed: int, dtype: torch.dtype
) -> None:
    x = torch.randn(columns, rows, generator=torch.Generator().manual_seed(seed)).to(dtype).t()
    before = x.clone()
    assert torch.equal(lower_medians(x), x.median(0).values)
    assert torch.equal(x, before)


def test_a_column_with_less_than_half_nan_has_a_median() -> None:
    x = torch.tensor([[1.0, torch.nan], [2.0, torch.nan], [torch.nan, 3.0]])
    assert lower_medians(x).nan_to_num(-1).tolist() == [2.0, -1.0]
    with pytest.raises(ValueError, match="no rows"):
        lower_medians(x[:0])


def test_inputs_are_left_as_they_are() -> None:
    x = torch.randn(31, 17, generator=torch.Generator().manual_seed(3)).t()
    before = x.clone()
    lower_median_magnitude(x)
    largest_magnitudes(x, 5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    "kind", ["normal", "outliers", "two values", "constant", "zero", "sorted", "few distinct", "by dim"]
)
def test_large_states(kind: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large enough that the median is looked for between two quantiles of a sample, or falls outside of them."""
    if not compiled:
        monkeypatch.setenv("SINKLENS_NATIVE", "0")
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(521, 307, generator=generator)
    if kind == "outliers":
        x[7, 11], x[300, 5] = -900.0, 700.0
    elif kind == "two values":
        x = torch.where(x > 0.001, 3.0, -1.0)
    elif kind in ("constant", "zero"):
        x = torch.full_like(x, -2.5 if kind == "constant" else 0.0)
    elif kind == "sorted":
        x = x.flatten().sort().values.view(521, 307)
    elif kind == "few distinct":
        x = (x * 2).round()
    elif kind == "by dim":
        x = x * torch.logspace(-3, 3, 307)
    assert lower_median_magnitude(x) == float(x.abs().median())
    view = torch.nn.functional.pad(x, (0, 9))[:, :307]
    assert lower_median_magnitude(view) == float(x.abs().median())
    order = torch.sort(x.abs().flatten(), descending=True, stable=True).indices[:50]
    for each in (x, view):
        found = largest_magnitudes(each, 50)
        assert torch.equal(found.pos * 307 + found.dim, order)
        assert torch.equal(found.value, x.flatten()[order])


@pytest.mark.parametrize("compiled", [True, False])
def test_what_is_not_a_number_ranks_above_everything(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setenv("SINKLENS_NATIVE", "0")
    x = torch.randn(401, 301, generator=torch.Generator().manual_seed(5))
    x[13] = float("nan")
    ranked = x.abs().flatten().sort().values  # NaN last
    assert lower_median_magnitude(x) == float(ranked[(x.numel() - 1) // 2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_states_in_half_precision(dtype: torch.dtype) -> None:
    x = torch.randn(521, 307, generator=torch.Generator().manual_seed(7)).to(dtype)
    assert lower_median_magnitude(x) == float(x.float().abs().median())
    found = largest_magnitudes(x, 40)
    order = torch.sort(x.float().abs().flatten(), descending=True, stable=True).indices[:40]
    assert torch.equal(found.pos * 307 + found.dim, order)


@pytest.mark.parametrize("shape", [(3, 5), (501, 197)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_is_found_and_not_passed_over(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    x[1, 3] = torch.nan
    found = largest_magnitudes(x, 4)
    assert (int(found.pos[0]), int(found.dim[0])) == (1, 3)
    assert found.value.isnan().tolist() == [True, False, False, False]
    every = largest_magnitudes(torch.full_like(x, torch.nan), 4)
    assert every.value.isnan().tolist() == [True] * 4


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_nothing_has_no_largest_entry_and_no_median(shape: tuple[int, int]) -> None:
    found = largest_magnitudes(torch.empty(shape), 3)
    assert found.value.shape == found.pos.shape == found.dim.shape == (0,)
    assert math.isnan(lower_median_magnitude(torch.empty(shape)))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_callers_default_dtype_does_not_matter(default: torch.dtype) -> None:
    """The compiled kernels write float32: memory of another type would be too small, or misread."""
    x = torch.randn(701, 197, generator=torch.Generator().manual_seed(3))
    expected, median = largest_magnitudes(x, 5), lower_median_magnitude(x)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert torch.equal(largest_magnitudes(x, 5).value, expected.value)
        assert lower_median_magnitude(x) == median
    finally:
        torch.set_default_dtype(before)
