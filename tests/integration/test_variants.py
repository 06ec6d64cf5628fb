"""How the variants of `--sensitivity` are made, and what each refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sinklens.core.errors import DataError, ResourceError
from sinklens.pipeline import variants as module
from sinklens.pipeline.listener import Silent
from sinklens.pipeline.options import ProfileOptions
from sinklens.pipeline.prepare import prepare
from sinklens.pipeline.variants import (
    Material,
    base_prompts,
    in_dtype,
    of_length,
    planned_tokens,
    random_tokens,
    repeated_token,
    special_ids,
    variants,
)


@pytest.fixture(scope="module")
def material() -> Material:
    options = ProfileOptions(n=9)
    prepared = prepare(None, None, options, Silent())
    return Material(prepared, options, base_prompts(prepared.prompts.prompts), seed=4)


def test_random_tokens_replace_the_text_only(material: Material) -> None:
    special = special_ids(material.prepared.opened.tokenizer)
    made = random_tokens(material)
    assert [len(p) for p in made] == [len(p) for p in material.base]
    for new, old in zip(made, material.base, strict=True):
        assert new.token_ids[0] == old.token_ids[0]  # BOS
        pairs = [(a, b) for a, b in zip(new.token_ids, old.token_ids, strict=True) if b not in special]
        assert not special & {a for a, _ in pairs}
        assert sum(a == b for a, b in pairs) < 0.2 * len(pairs)
    assert made == random_tokens(material)
    assert made != random_tokens(replace(material, seed=5))


def test_a_repeated_token_fills_every_position(material: Material) -> None:
    for prompt in repeated_token(material):
        assert len(set(prompt.token_ids)) == 1


@pytest.mark.parametrize("length", [37, 128, 256])
def test_prompts_have_exactly_the_length(material: Material, length: int) -> None:
    """Shorter than the source's texts they are cut; longer, the texts are joined."""
    made = of_length(material, length)
    assert made
    assert {len(prompt) for prompt in made} == {length}
    start = material.base[0].token_ids
    assert length > 64 or made[0].token_ids == start[:length]


def test_lengths_beyond_the_model_or_the_text_are_refused(material: Material) -> None:
    with pytest.raises(DataError, match="at most 512 tokens"):
        of_length(material, 1024)
    little = replace(material, options=ProfileOptions(prompts=[[1, 5, 9, 7] * 10]))
    with pytest.raises(DataError, match="not enough text"):
        of_length(little, 256)


def test_a_copy_that_does_not_fit_is_refused(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: 1000)
    with pytest.raises(ResourceError, match="second copy"):
        in_dtype(material, "float32")


def test_every_group_is_there_once_and_the_run_itself_is_not(material: Material) -> None:
    made = list(variants(material))
    labels = [variant.label for variant in made]
    assert len(set(labels)) == len(labels)
    assert {variant.group for variant in made} == {"BOS", "chat template", "text", "length", "dtype"}
    assert "without BOS" in labels
    assert "at 64 tokens" not in labels  # the prompts have 64
    assert "in bfloat16" not in labels  # the model is in bfloat16
    assert [variant.label for variant in made if not variant.votes] == ["with one token repeated"]


def test_the_plan_counts_about_what_is_run(material: Material) -> None:
    passes, tokens = planned_tokens(material.prepared.prompts.prompts)
    made: list[Any] = [material.base]
    for variant in variants(material):
        try:
            made.append(variant.make())
        except DataError:
            continue
    assert len(made) <= passes <= len(made) + 5
    assert sum(len(prompt) for prompts in made for prompt in prompts) <= tokens


def test_long_prompts_are_fewer_but_not_fewer_than_four(material: Material) -> None:
    prompt = material.base[0]
    long = tuple(replace(prompt, index=i, token_ids=(3,) * 3000) for i in range(7))
    assert len(base_prompts(long)) == 4
    assert len(base_prompts(long[:2])) == 2
    short = tuple(replace(prompt, index=i, token_ids=(3,) * 50) for i in range(40))
    assert len(base_prompts(short)) == 16
