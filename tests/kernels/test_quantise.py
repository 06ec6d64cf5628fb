"""Round-to-nearest against the plainest quantiser there is: numpy, one value at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sinklens.core.errors import UsageError
from sinklens.kernels.quantise import Scheme, fake_quantised


def naive(values: np.ndarray, bits: int, symmetric: bool) -> np.ndarray:
    """Values that share a scale, one after the other, in their own precision."""
    one = values.dtype.type
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = one(max(abs(value) for value in values) / one(top))
        scale = scale if scale > 0 else one(1)
        return np.array([one(np.rint(value / scale) * scale) for value in values])
    low, high = min(0, *values), max(0, *values)
    top = 2**bits - 1
    scale = one(one(one(high) - one(low)) / one(top))
    scale = scale if scale > 0 else one(1)
    zero = np.rint(one(-one(low) / scale))
    return np.array([one((min(max(np.rint(v / scale) + zero, 0), top) - zero) * scale) for v in values])


def groups(shape: tuple[int, int, int], scheme: Scheme) -> list[list[tuple[int, int, int]]]:
    """Places that share a scale."""
    matrices, rows, columns = shape
    found: dict[Any, list[tuple[int, int, int]]] = {}
    for m in range(matrices):
        for r in range(rows):
            for c in range(columns):
                key = {"tensor": m, "row": (m, r), "column": (m, c), "group": (m, r, c // scheme.group)}
                found.setdefault(key[scheme.by], []).append((m, r, c))
    return list(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("protected", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("by", ["tensor", "row", "column", "group"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_value_is_that_of_the_naive_quantiser(
    bits: int, by: Any, symmetric: bool, protected: bool, dtype: torch.dtype
) -> None:
    rng = torch.Generator().manual_seed(bits)
    x = torch.randn(2, 7, 11, generator=rng, dtype=dtype)
    x[0, 3, 4], x[1, 2] = 300.0, x[1, 2].abs()
    x[1, 5] = 0
    scheme = Scheme(bits, by, symmetric, group=4)
    kept = torch.rand(x.shape, generator=rng) < 0.15
    kept[0, 3, 4] = True
    found = fake_quantised(x, scheme, kept if protected else None).numpy()
    expected = x.numpy().copy()
    for places in groups((2, 7, 11), scheme):
        mine = [place for place in places if not (protected and kept[place])]
        if mine:
            rounded = naive(np.array([expected[place] for place in mine]), bits, symmetric)
            for place, value in zip(mine, rounded, strict=True):
                expected[place] = value
    np.testing.assert_array_equal(found, expected)


def test_bits_and_errors_are_as_the_formula_says() -> None:
    x = torch.linspace(-1, 2, 1001)[None, None]
    for bits in (2, 4, 8):
        symmetric = fake_quantised(x, Scheme(bits, "tensor"))
        assert len(symmetric.unique()) <= 2**bits
        assert float((symmetric - x).abs().max()) <= 0.5 * 2 / (2 ** (bits - 1) - 1) + 1e-6
        spanning = fake_quantised(x, Scheme(bits, "tensor", symmetric=False))
        assert len(spanning.unique()) == 2**bits
        assert float((spanning - x).abs().max()) <= 3 / (2**bits - 1) + 1e-6
    assert float(fake_quantised(torch.zeros(1, 1, 3), Scheme(4)).abs().max()) == 0


def test_one_large_value_takes_the_grid_and_its_protection_gives_it_back() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 64, generator=rng)
    x[0, 0, 5] = 1000
    scheme, kept = Scheme(8, "tensor"), (torch.arange(64) == 5)[None, None]
    others = ~kept
    assert bool((fake_quantised(x, scheme)[others] == 0).all())
    protected = fake_quantised(x, scheme, kept)
    assert float(protected[0, 0, 5]) == 1000
    assert float((protected - x).abs().max()) < 0.02


def test_half_precision_comes_back_as_such() -> None:
    x = torch.randn(1, 5, 8).bfloat16()
    found = fake_quantised(x, Scheme(8))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, fake_quantised(x.float(), Scheme(8)).bfloat16())


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"bits": 1}, "1 bits"),
        ({"bits": 17}, "17 bits"),
        ({"bits": 8, "group": 0}, "group of 0"),
    ],
)
def test_grids_that_are_none_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Scheme(**fields)
