"""JSON without surprises."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum, StrEnum
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sinklens.core.canonical import dumps, plain


class Colour(StrEnum):
    RED = "red"


class Number(Enum):
    NAN = float("nan")


@dataclass(frozen=True)
class Inner:
    value: float
    at: tuple[int, int]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), None),
        (-np.inf, None),
        (np.float32("nan"), None),
        (np.float64(0.5), 0.5),
        (np.int16(-3), -3),
        (np.bool_(True), True),
        (np.array([[1.0, np.nan]]), [[1.0, None]]),
        (torch.tensor([1, 2]), [1, 2]),
        (torch.tensor(0.25, dtype=torch.bfloat16), 0.25),
        (Colour.RED, "red"),
        (Number.NAN, None),
        (np.str_("x"), "x"),
        (Inner(float("inf"), (1, 2)), {"value": None, "at": [1, 2]}),
        ({3: 1, None: 2, True: 3, Colour.RED: 4, 0.5: 5}, {"3": 1, "null": 2, "true": 3, "red": 4, "0.5": 5}),
        ({"b", "a"}, ["a", "b"]),
        (frozenset({10, 9}), [10, 9]),
        (Path("/secret/place/run.json"), "run.json"),
        (2**80, 2**80),
    ],
)
def test_plain(value, expected):
    found = plain(value)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("value", [object(), b"bytes", {(1, 2): 3}, 1j, Inner])
def test_what_cannot_be_written(value):
    with pytest.raises(TypeError):
        plain(value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_dumps_is_strict_json_and_stable(value):
    def refuse(constant):
        raise AssertionError(constant)

    text = dumps(value)
    again = json.loads(text, parse_constant=refuse)
    assert again == plain(value)
    assert dumps(again) == text


def test_dumps_keeps_order_and_letters():
    assert dumps({"b": "ü", "a": 1}) == '{"b": "ü", "a": 1}'
