"""A model whose parts transformers places on devices gives the findings of one that is placed as a whole."""

from __future__ import annotations

from typing import Any

import numpy as np

import sinklens as sl


def test_a_device_map_changes_no_finding_and_no_number() -> None:
    asked: dict[str, Any] = {"n": 3, "verify": False, "analyzers": ("primary-sinks", "massive-activations")}
    placed, whole = sl.profile(device_map="auto", **asked), sl.profile(device="cpu", **asked)
    for one, other in zip(placed.trace, whole.trace, strict=True):
        for name, array in other.arrays.items():
            np.testing.assert_allclose(one.arrays[name], array, atol=1e-5, err_msg=name)
    assert placed.verdict == whole.verdict
    assert all(check.passed for check in placed.checks)
    request = placed.trace.manifest["request"]
    assert (request["device_map"], request["stream"]) == ("auto", "off")
