"""Regularisers in a short training: each lowers what it is about, from the same weights on the same data."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from sinklens.core.errors import UsageError
from sinklens.mitigations.regularisers import Decorrelation, SinkMass
from sinklens.pipeline.regularised_training import regularised_training
from sinklens.testbeds.recipe import recipes

TINY = replace(
    recipes["dense-ind"],
    model={**recipes["dense-ind"].model, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3},
    length=24,
    batch=8,
    warmup=5,
)


def test_each_term_lowers_what_it_is_about() -> None:
    variants = {
        "plain": None,
        "mass": lambda: {SinkMass(): 5.0},
        "cosine": lambda: {Decorrelation(): 3.0},
    }
    found = regularised_training(TINY, variants, steps=20, seeds=(0, 1), prompts=16)
    assert json.loads(json.dumps(found)) == found
    rows = found["variants"]
    for name, quantity, most in (
        ("mass", "sink_mass", 0.8), ("cosine", "squared_cosine", 0.5),
    ):  # fmt: skip
        for mine, plain in zip(
            rows[name][quantity]["values"], rows["plain"][quantity]["values"], strict=True
        ):
            assert mine < most * plain, name
    assert rows["plain"]["loss"]["difference"]["mean"] == 0
    again = regularised_training(TINY, {"plain": None}, steps=20, seeds=(0,), prompts=16)
    assert again["variants"]["plain"]["loss"]["values"][0] == rows["plain"]["loss"]["values"][0]


def test_without_a_plain_variant_there_is_nothing_to_compare_with() -> None:
    with pytest.raises(UsageError, match="first variant must be the one without terms"):
        regularised_training(TINY, {"mass": lambda: {SinkMass(): 1.0}}, steps=1)
