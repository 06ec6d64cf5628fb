"""Mitigations as context managers: what they leave behind and what they report."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from sinklens.core.errors import ModelError
from sinklens.mitigations import (
    ACT,
    AttentionScaling,
    KnockOut,
    Mitigation,
    NothingEdited,
    ZeroTuning,
)
from sinklens.models.opening import open_model
from sinklens.tracers.attention import STANDS_FOR

from ..families import HEADS, LAYERS, PAD, build, inputs
from .dense import places, rewritten, scaled_map


def state(model: Any) -> list[Any]:
    """Everything a mitigation could leave on a model or in transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    hooks = [
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(vars(module).get("forward", ()))
        for module in model.modules()
    ]
    names = [sorted(registry.valid_keys()) for registry in (AttentionInterface(), AttentionMaskInterface())]
    return [hooks, model.config._attn_implementation, names]


def logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


@pytest.mark.parametrize("family", ["llama", "gemma2", "llava"])
def test_nothing_stays_on_the_model(family: str) -> None:
    model, given = build(family), inputs(family, padding="left")
    plain = logits(model, given)  # the first call of some models leaves hooks of transformers' own
    before = state(model)
    with ZeroTuning()(model):
        assert state(model) != before
        assert not torch.equal(logits(model, given), plain)
    assert state(model) == before
    assert torch.equal(logits(model, given), plain)
    assert not any(name in str(before) for name in STANDS_FOR)


def test_nothing_stays_after_an_error() -> None:
    model, given = build("llama"), inputs("llama")
    before = state(model)

    def fails() -> None:
        with KnockOut()(model):
            logits(model, given)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert state(model) == before
    with pytest.raises(RuntimeError), KnockOut()(model):
        model(input_ids=given["input_ids"].float())
    assert state(model) == before


@pytest.mark.parametrize(
    "mitigation",
    [
        ZeroTuning(gamma=1.0),
        ZeroTuning(gamma=1.0, gammas={(1, 1): 1.0}),
        ACT(beta=1.0),
        AttentionScaling(factor=1.0, positions=(2,)),
    ],
)
def test_the_identity_changes_no_bit_and_says_so(mitigation: Mitigation) -> None:
    model, given = build("llama", dtype=torch.bfloat16), inputs("llama", padding="left")
    before, plain = state(model), logits(model, given)
    with mitigation(model) as effect:
        assert state(model) == before
        assert torch.equal(logits(model, given), plain)
    assert not effect.acted
    assert "is the identity" in effect.verdict
    with pytest.raises(ModelError, match="identity"):
        effect.require()


def test_heads_of_gamma_one_keep_every_bit() -> None:
    """Head 1 of a key head that two query heads share is tuned alone; what the others write is untouched."""
    model, given = build("llama"), inputs("llama", padding="left")
    real = given["attention_mask"] != 0

    def heads_of_layer_0() -> Tensor:
        found = []
        projection = model.model.layers[0].self_attn.o_proj
        handle = projection.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        logits(model, given)
        handle.remove()
        return found[0].unflatten(-1, (HEADS, -1))

    plain = heads_of_layer_0()
    with ZeroTuning(gamma=1.0, gammas={(0, 1): 3.0})(model):
        gammas = heads_of_layer_0()
    with ZeroTuning(gamma=3.0, heads=[(0, 1)])(model):
        pairs = heads_of_layer_0()
    others = [head for head in range(HEADS) if head != 1]
    assert torch.equal(gammas[:, :, others], plain[:, :, others])
    assert torch.equal(gammas, pairs)
    later = real & (real.cumsum(1) > 1)
    assert bool((gammas[later][:, 1] != plain[later][:, 1]).any(-1).all())


def test_shared_heads_are_one_index_in_all_layers() -> None:
    model, given = build("llama"), inputs("llama")
    with ZeroTuning(shared_heads=[2])(model) as effect:
        shared = logits(model, given)
    with ZeroTuning(heads=[(layer, 2) for layer in range(LAYERS)])(model):
        pairs = logits(model, given)
    assert torch.equal(shared, pairs)
    with ZeroTuning(gamma=1.0, gammas=[(layer, 2, 2.0) for layer in range(LAYERS)])(model):
        assert torch.equal(logits(model, given), pairs)
    assert effect.rows_seen == LAYERS * 2 * 13


def test_the_effect_counts_rows_and_the_attention_moved() -> None:
    model, given = build("llama"), inputs("llama", batch=2, length=11, padding="left")
    real = given["attention_mask"] != 0
    moved: list[Tensor] = []

    def rewrite(site: Any, weights: Tensor) -> Tensor:
        new = scaled_map(weights, places(real, 0)[:, None], 5.0)
        if site.layer != 2:
            return weights
        for row, first in enumerate(places(real, 0).tolist()):
            new[row, :, first] = weights[row, :, first]
        moved.append(0.5 * (new - weights).abs().sum(-1)[real[:, None].expand(-1, HEADS, -1)])
        return new

    with rewritten(model, rewrite, real):
        logits(model, given)
    with ZeroTuning(gamma=5.0, layers=[2])(model) as effect:
        logits(model, given)
    assert effect.calls == 1
    assert effect.rows_seen == HEADS * (11 + 8)
    assert effect.rows_edited == HEADS * (10 + 7)
    assert effect.mean_mass_moved == pytest.approx(float(moved[0].sum()) / effect.rows_edited, rel=1e-4)
    assert effect.by_layer == {2: (effect.rows_edited, effect.mean_mass_moved)}
    assert effect.require() is effect
    assert effect.verdict.startswith(f"zero-tuning edited {effect.rows_edited} attention rows (89% of those")


def test_doing_nothing_is_never_silent() -> None:
    """The authors' column 0 is padding in a left-padded batch: a warning, and a refusal to call it an effect."""
    model, given = build("llama"), inputs("llama", batch=3, length=17, padding="left")
    shorter = {key: value[1:] for key, value in given.items()}
    plain = logits(model, shorter)
    told = pytest.warns(NothingEdited, match="zero-tuning did not act: 4 attention calls")
    with told, ZeroTuning(recipe="code")(model) as effect:
        assert torch.equal(logits(model, shorter), plain)
    assert effect.rows_edited == 0
    assert effect.rows_seen > 0
    one = pytest.warns(NothingEdited, match="did not act: 1 attention call was seen")
    with one, ZeroTuning(recipe="code", layers=[2])(model):
        logits(model, shorter)
    with pytest.raises(ModelError, match="did not act"):
        effect.require()
    with ZeroTuning(recipe="code")(model) as effect:
        logits(model, given)
    assert effect.rows_edited == LAYERS * HEADS * 16  # the one row without padding


def test_not_running_the_model_is_told_apart() -> None:
    with pytest.warns(NothingEdited, match="the model was not run"), KnockOut()(build("llama")):
        pass


def test_an_error_inside_is_not_covered_by_a_warning() -> None:
    def fails() -> None:
        with KnockOut()(build("llama")):
            raise KeyError

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError):
            fails()


def test_a_model_without_sinks_in_the_prompt_is_left_alone() -> None:
    model, given = build("llama"), inputs("llama")
    plain = logits(model, given)
    with pytest.warns(NothingEdited, match="act did not act"), ACT(threshold=0.999)(model):
        assert torch.equal(logits(model, given), plain)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize(
    "mitigation", [ZeroTuning(gamma=0.2), KnockOut(positions=(0, 2))], ids=lambda m: m.name
)
def test_generate_with_a_cache_is_generate_without(family: str, mitigation: Mitigation) -> None:
    """Batched, left-padded, past the windows of 8; every row alone gives the same tokens."""
    model, given = build(family), inputs(family, batch=2, length=11, padding="left")
    single = {"input_ids": given["input_ids"][1:, 3:], "attention_mask": torch.ones(1, 8).long()}

    def generated(given: dict[str, Tensor], **more: Any) -> Tensor:
        """Logits of 9 generated tokens, `[step batch vocabulary]`."""
        options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD, **more}
        return torch.stack(
            model.generate(**given, **options, output_logits=True, return_dict_in_generate=True).logits
        )

    plain = generated(given)
    with mitigation(model) as effect:
        cached = generated(given)
        steps = effect.calls // LAYERS
        others = [
            generated(given, use_cache=False),
            generated(given, cache_implementation="static"),
            generated(single),
        ]
    assert steps == 9
    limit = 2e-5 * float(cached.abs().max())
    for other in others:
        torch.testing.assert_close(cached[:, -other.shape[1] :], other, rtol=0, atol=limit)
    assert float((cached[0] - plain[0]).abs().max()) > 100 * limit


def test_act_in_generate_finds_the_sinks_of_every_prompt_anew() -> None:
    model = build("llama")
    mitigation = ACT(alpha=2.0, beta=0.0, layers=range(LAYERS))
    first, second = (inputs("llama", batch=2, length=n, padding="left", seed=n) for n in (13, 17))
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": PAD,
    }
    with mitigation(model):
        together = [model.generate(**given, **options) for given in (first, second, first)]
    for given, found in zip((first, second, first), together, strict=True):
        with mitigation(model):
            assert torch.equal(model.generate(**given, **options), found)
    assert not torch.equal(together[0], model.generate(**first, **options))


def test_beams_share_the_prompts_sinks() -> None:
    model, given = build("llama"), inputs("llama", batch=2, length=13, padding="left")
    options: dict[str, Any] = {
        "num_beams": 3,
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": PAD,
    }
    mitigation = ACT(alpha=2.0, beta=0.0, layers=range(LAYERS))
    with mitigation(model):
        batched = model.generate(**given, **options)
        alone = model.generate(given["input_ids"][1:, 3:], attention_mask=torch.ones(1, 10).long(), **options)
    assert torch.equal(batched[1, 3:], alone[0])


def test_returned_maps_are_the_edited_ones() -> None:
    """`output_attentions` of an eager model shows what was used, not what the kernel had before."""
    model, given = build("llama"), inputs("llama", batch=2, length=13, padding="left")
    model.set_attn_implementation("eager")
    real = given["attention_mask"] != 0
    with torch.no_grad():
        plain = model(**given, output_attentions=True).attentions[0].double()
        with ZeroTuning(gamma=3.0)(model):
            found = model(**given, output_attentions=True).attentions[0].double()
    expected = scaled_map(plain, places(real, 0)[:, None], 3.0)
    rows = real[:, None].expand(-1, HEADS, -1)
    torch.testing.assert_close(found[rows], expected[rows], rtol=0, atol=1e-6)
    assert not torch.allclose(found[rows], plain[rows], atol=1e-2)


def test_an_opened_model_and_the_base_model_will_do() -> None:
    model, given = build("llama"), inputs("llama", padding="left")
    opened = open_model(model)
    with ZeroTuning()(model):
        expected = logits(model, given)
        with torch.no_grad():
            hidden = model.model(**given).last_hidden_state
            assert torch.equal(model.lm_head(hidden), expected)
            assert torch.equal(model(given["input_ids"], given["attention_mask"]).logits, expected)
    with ZeroTuning()(opened):
        assert torch.equal(logits(model, given), expected)
