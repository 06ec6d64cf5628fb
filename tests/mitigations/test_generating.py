"""Mitigations under generate(): beams, prompts in pieces, static caches, candidates; the same tokens, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sinklens.core.errors import ModelError
from sinklens.mitigations import (
    ACT,
    PAI,
    VAR,
    KnockOut,
    KVBias,
    LearnedSink,
    NothingEdited,
    SinkGating,
    ValueBias,
    ZeroTuning,
)
from sinklens.mitigations.tokens import Tokens
from sinklens.models.anatomy import find_anatomy

from ..families import IMAGE, PAD, VIDEO, build, inputs
from .test_var import DIMS, TAU

TEXT = {
    "zero-tuning": ZeroTuning(gamma=4.0),
    "knock-out": KnockOut(positions=(0, 3)),
    "learned-sink": LearnedSink(logit=(0.5, 2.0, -1.0, 3.0), replaces=(0,)),
    "kv-bias": KVBias(key=torch.ones(4, 2, 16).tolist(), value=torch.ones(4, 2, 16).tolist(), replaces=(1,)),
    "value-bias": ValueBias(value=torch.ones(4, 2, 16).tolist()),
    "act": ACT(alpha=2.0, layers=range(4)),
}
PICTURES = {
    "pai": PAI(alpha=0.7, start=1),
    "var": VAR(dims=DIMS, tau=TAU, rho=0.5, floor=0.1),
    "sink-gating": SinkGating(sink=0.3, rest=2.5, dims=DIMS, tau=TAU),
}
METHODS = {**TEXT, **PICTURES}
WAYS: dict[str, dict[str, Any]] = {
    "pieces": {"prefill_chunk_size": 5},
    "a last piece of one token": {"prefill_chunk_size": 8},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "looked up": {"prompt_lookup_num_tokens": 3},
}


def generated(model: Any, given: dict[str, Tensor], **more: Any) -> Any:
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    options |= {"suppress_tokens": [IMAGE, VIDEO]}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    return model.generate(**given, **{**options, **more})


def family_of(name: str) -> str:
    return "llava" if name in PICTURES else "llama"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", METHODS)
def test_every_way_gives_the_same(name: str, way: str) -> None:
    model, mitigation = build(family_of(name)), METHODS[name]
    alone = way == "looked up"  # takes one prompt at a time
    given = inputs(family_of(name), batch=1 if alone else 2, length=17, padding=None if alone else "left")
    with mitigation(model) as whole:
        expected = generated(model, given)
    if name == "act" and "piece" in way:
        refused = pytest.raises(ModelError, match="needs the whole prompt in one pass")
        with pytest.warns(NothingEdited), mitigation(model), refused:
            generated(model, given, **WAYS[way])
        return
    with mitigation(model) as effect:
        found = generated(model, given, **WAYS[way])
    assert "_prefill" not in vars(model)
    torch.testing.assert_close(found.sequences, expected.sequences)
    for step, logits in enumerate(found.logits):
        torch.testing.assert_close(logits, expected.logits[step], rtol=0, atol=2e-4)
    if not alone:
        assert effect.rows_edited == whole.rows_edited or way == "no cache"
    assert effect.acted


@pytest.mark.parametrize("name", METHODS)
def test_beams(name: str) -> None:
    """Every beam's scores are those of a fresh pass over what it holds."""
    model, mitigation = build(family_of(name)), METHODS[name]
    given = inputs(family_of(name), batch=2, length=17, padding="left")
    with mitigation(model) as effect:
        out = generated(model, given, num_beams=3, output_scores=True)
    prompt = given["input_ids"].shape[1]
    told = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    fresh = grown(given, out.sequences)
    with mitigation(model):
        steps = [model_logits(model, fresh, prompt, at) for at in range(out.sequences.shape[1] - prompt)]
    scores = torch.stack(steps, 1).log_softmax(-1).gather(2, out.sequences[:, prompt:, None])[..., 0]
    torch.testing.assert_close(told, scores, rtol=0, atol=2e-4)
    assert effect.acted


def grown(given: dict[str, Tensor], sequences: Tensor) -> dict[str, Tensor]:
    """The prompts with their answers."""
    more = torch.ones_like(sequences[:, given["input_ids"].shape[1] :])
    mask = torch.cat([given["attention_mask"], more], 1)
    return {**given, "input_ids": sequences, "attention_mask": mask}


def model_logits(model: Any, given: dict[str, Tensor], prompt: int, at: int) -> Tensor:
    """Logits that chose the token `at` of the answer, the prompt read and then the answer token by token."""
    width = given["input_ids"].shape
    if (
        "pixel_values" not in given
    ):  # as generate() counts: a bias that is not rotated sees absolute positions
        given = {**given, "position_ids": (given["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    first = {k: v[:, :prompt] if v.shape == width else v for k, v in given.items()}
    with torch.no_grad():
        out = model(**first, use_cache=True)
        for place in range(prompt, prompt + at):
            out = model(
                input_ids=given["input_ids"][:, place : place + 1],
                attention_mask=given["attention_mask"][:, : place + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
                **(
                    {"position_ids": given["position_ids"][:, place : place + 1]}
                    if "position_ids" in given
                    else {}
                ),
            )
    return out.logits[:, -1]


def test_sinks_of_generated_tokens_are_not_followed_through_beams() -> None:
    model, given = build("llava"), inputs("llava", batch=2, length=17, padding="left")
    mitigation = VAR(dims=DIMS, tau=TAU, rho=0.5, floor=0.1, update_decode=True)
    with mitigation(model), pytest.raises(ModelError, match="cannot be followed through a beam search"):
        generated(model, given, num_beams=2)
    with mitigation(model):
        generated(model, given)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_seen_from_every_generated_token(family: str, name: str) -> None:
    """Positions in three axes and their shift while decoding: a step's logits are those of the whole sequence."""
    model, mitigation = build(family), PICTURES[name]
    given = inputs(family, batch=2, length=11, padding="left")
    plain = generated(model, given)
    with mitigation(model) as effect:
        found = generated(model, given)
        fresh = generated(model, given, use_cache=False)
    for step, logits in enumerate(found.logits):
        torch.testing.assert_close(logits, fresh.logits[step], rtol=0, atol=2e-4)
    assert not torch.allclose(found.logits[-1], plain.logits[-1], atol=1e-3)
    assert effect.acted


def test_two_watches_learn_of_the_same_prompt_and_leave_nothing() -> None:
    model, given = build("llama"), inputs("llama", batch=2, length=17, padding="left")
    tower = find_anatomy(model).main
    with Tokens().watched(model, tower) as first, Tokens().watched(model, tower) as second:
        generated(model, given, prefill_chunk_size=6)
        assert first.prompt == second.prompt == given["input_ids"].shape[1]
        assert not first.reading
    assert not {"_prefill", "generate"} & set(vars(model))
