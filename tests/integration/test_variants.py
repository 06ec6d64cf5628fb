"""How the variants of `--sensitivity` are made, and what each refuses."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sinklens.core.errors import DataError, ResourceError
from sinklens.inputs.spec import Prompt
from sinklens.pipeline import variants as module
from sinklens.pipeline.listener import Silent
from sinklens.pipeline.options import ProfileOptions
from sinklens.pipeline.prepare import prepare
from sinklens.pipeline.variants import (
    Material,
    base_prompts,
    edges,
    in_dtype,
    inside,
    of_length,
    planned_tokens,
    random_tokens,
    repeated_token,
    special_ids,
    variants,
)
from tests.families import build


@pytest.fixture(scope="module")
def material() -> Material:
    options = ProfileOptions(n=9)
    prepared = prepare(None, None, options, Silent())
    return Material(prepared, options, base_prompts(prepared.prompts.prompts), seed=4)


def test_random_tokens_replace_the_text_only(material: Material) -> None:
    special = material.special
    assert special == special_ids(material.prepared.opened.tokenizer)
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


@pytest.mark.parametrize("length", [37, 64, 128, 256, 510])
def test_prompts_of_every_length_have_one_bos_and_continuous_text(material: Material, length: int) -> None:
    """Several BOS would share what the sink receives; what is compared is the length alone."""
    read: list[tuple[Prompt, ...]] = []

    class Remembering(Material):
        def texts(self, length: int, n: int | None = None) -> tuple[Prompt, ...]:
            read.append(super().texts(length, n))
            return read[-1]

    bos = material.bos
    made = of_length(Remembering(material.prepared, material.options, material.base, material.seed), length)
    flow = [token for prompt in read[-1] for token in prompt.token_ids if token != bos]
    for prompt in made:
        assert prompt.token_ids[0] == bos
        assert bos not in prompt.token_ids[1:]
        assert len(prompt.pieces) == length
        text = list(prompt.token_ids[1:])
        assert any(flow[at : at + len(text)] == text for at in range(len(flow)))
    assert len({prompt.token_ids for prompt in made}) == len(made)


def test_other_lengths_follow_the_runs_own_bos(material: Material) -> None:
    """A run without BOS gets none; one whose tokenizer puts something after a text keeps that."""
    without = replace(material, options=replace(material.options, bos="off"))
    without = replace(without, base=tuple(without.read(n=9)))
    assert not any(material.bos in prompt.token_ids for prompt in of_length(without, 128))
    end = 7
    tokenizer = SimpleNamespace(bos_token_id=material.bos, eos_token_id=end)
    opened = replace(material.prepared.opened, tokenizer=tokenizer)
    base = tuple(replace(p, token_ids=(*p.token_ids, end), pieces=(*p.pieces, "</s>")) for p in material.base)
    head, tail = edges(replace(material, prepared=replace(material.prepared, opened=opened), base=base))
    assert [token.id for token in (*head, *tail)] == [material.bos, end]
    assert [token.id for token in inside(base[0], material.bos, tail)] == list(base[0].token_ids[1:-1])


def test_lengths_do_not_vote_where_the_run_has_several_bos(material: Material) -> None:
    joined = tuple(replace(p, token_ids=p.token_ids * 2, pieces=p.pieces * 2) for p in material.base)
    lengths = [v for v in variants(replace(material, base=joined)) if v.group == "length"]
    assert lengths
    assert not any(variant.votes for variant in lengths)
    assert all("more than one BOS" in variant.note for variant in lengths)


def in_memory(bos: int | None) -> Material:
    model: Any = build("llama")
    model.config.bos_token_id = bos
    prompts = [[1, *range(5, 60)], [1, *range(9, 64)], [1, *range(3, 50)]]
    options = ProfileOptions(prompts=prompts)
    prepared = prepare(model, None, options, Silent())
    return Material(prepared, options, base_prompts(prepared.prompts.prompts), seed=4)


@pytest.mark.parametrize("bos", [1, None])
def test_a_bos_that_only_the_config_names_stays(bos: int | None) -> None:
    """A model in memory has no tokenizer; what is replaced beside the text is told."""
    material = in_memory(bos)
    assert material.bos == bos
    first = {prompt.token_ids[0] for prompt in random_tokens(material)}
    note = next(v.note for v in variants(material) if v.label == "with random tokens")
    if bos is None:
        assert first != {1}
        assert "All prompts begin with token 1, which was replaced as well" in note
    else:
        assert first == {1}
        assert not note
        assert all(1 not in prompt.token_ids[1:] for prompt in random_tokens(material))


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
