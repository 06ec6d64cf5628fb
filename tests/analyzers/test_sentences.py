"""Sentences of analyzers agree in number, have a subject, and do not put a sign on nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sinklens.analyzers import secondary_words, sink_geometry, zeroed_heads
from sinklens.analyzers.head_classes import HeadClasses
from sinklens.analyzers.sink_geometry import SinkGeometry

CHAIN: dict[str, Any] = {
    "primary_position": 0, "primary_token": "<s>", "active_first": 2, "active_last": 9, "per_1000_tokens": 3.0,
    "births_recorded": 0, "n_written_by_mlp": 0, "median_input_cosine": None, "median_down_cosine": None,
}  # fmt: skip


@pytest.mark.parametrize(("count", "tokens"), [(1, " 1 token rises"), (3, " 3 tokens rise")])
def test_tokens_beside_the_primary_sink_are_instead_of_secondary_ones_only_where_there_are_none(
    count: int, tokens: str
) -> None:
    summary = {**CHAIN, "n_with_primary": count}
    none = secondary_words.verdict([], [], summary)
    assert none.endswith(f"{tokens} together with it instead.")
    some: Any = [SimpleNamespace(creation=4)]
    assert secondary_words.verdict(some, [], summary).endswith(f"{tokens} together with the primary sink.")
    assert "together" not in secondary_words.verdict(some, [], {**CHAIN, "n_with_primary": 0})


def test_one_prompt_has_and_two_have() -> None:
    assert secondary_words._left_out(1) == "1 prompt has no primary sink by norm and was left out."
    assert secondary_words._left_out(2) == "2 prompts have no primary sink by norm and were left out."


def test_classes_of_one_head_are_told_in_the_singular() -> None:
    ones = dict.fromkeys(("n_strong_sink", "n_moderate_sink", "n_distributed", "n_recency", "n_mixed"), 1)
    verdict = HeadClasses()._verdict({"first": 4, "n_heads": 8, **ones})
    assert verdict.endswith("in 1 other; 1 spreads it, 1 looks at recent tokens, 1 does something else.")
    twos = dict.fromkeys(ones, 2)
    verdict = HeadClasses()._verdict({"first": 4, "n_heads": 10, **twos})
    assert verdict.endswith("in 2 others; 2 spread it, 2 look at recent tokens, 2 do something else.")


def test_what_rounds_to_nothing_has_no_sign() -> None:
    zeroed = {
        "zeroed_heads": [[1, 2]], "zeroed_loss_change": 0.0001, "zeroed_loss_change_low": -0.0002,
        "zeroed_loss_change_high": 0.0123, "zeroed_loss_change_others": -0.5,
    }  # fmt: skip
    note = zeroed_heads.zeroed_note(zeroed)[0]
    assert note.endswith("by 0.000 nats per token (0.000 to +0.012), zeroing as many other heads by -0.500.")


@pytest.mark.parametrize(
    ("ratio", "said"), [(1.0, "and its key is 1.00 times"), (0.2, "although its key is short (0.20 times")]
)
def test_the_length_beside_an_angle_effect_has_its_subject(ratio: float, said: str) -> None:
    found = {
        "position": 0, "token": "<s>", "cosine_contrast": 0.9, "angle_effect": True, "length_effect": False,
        "cosine": 0.9, "cosine_others": 0.0, "key_ratio": ratio, "n_drain_known": 0,
    }  # fmt: skip
    assert f", {said} as long as the others" in SinkGeometry()._verdict(found)
    assert "of unknown length" in sink_geometry._key_words({"key_ratio": None})
