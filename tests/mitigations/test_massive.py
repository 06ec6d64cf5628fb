"""Massive activations overwritten, against plain hooks on models in which they were planted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sinklens.core.errors import ModelError, UsageError
from sinklens.inputs.spec import Prompt
from sinklens.mitigations import MassiveActivations, NothingEdited
from sinklens.models.opening import open_model
from sinklens.testbeds import MassivePlant, SinkPlant, plant
from sinklens.testbeds.recipe import recipes
from sinklens.testbeds.train import held_out

from ..families import BOS, PAD, build, inputs
from .test_with import logits, state

COMMA = 7
"""A token that is massive wherever it stands, with the other sign."""


def planted() -> Any:
    model = build("llama")
    plants = [MassivePlant(11, 1, magnitude=2000.0), MassivePlant(23, 2, token=COMMA, magnitude=-1500.0)]
    plant(model, sinks=[SinkPlant([(2, 1)])], massive=plants)
    return model


def prompts(count: int = 4, length: int = 17) -> list[Prompt]:
    rng = torch.Generator().manual_seed(5)
    ids = torch.randint(20, 300, (count, length), generator=rng)
    ids[:, 0], ids[:, 6] = BOS, COMMA
    return [Prompt(i, tuple(row), tuple(map(str, row)), "made") for i, row in enumerate(ids.tolist())]


def padded(side: str) -> dict[str, Tensor]:
    rows = [list(prompt.token_ids[: 17 - 4 * i]) for i, prompt in enumerate(prompts(3))]
    fill = [[PAD] * (17 - len(row)) for row in rows]
    joined = [[*f, *row] if side == "left" else [*row, *f] for row, f in zip(rows, fill, strict=True)]
    ids = torch.tensor(joined)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def test_calibration_takes_signed_means_by_kind_of_token() -> None:
    model = planted()
    method = MassiveActivations().calibrated(model, prompts())
    found = {(layer, first, dim): value for layer, first, dim, value in method.means}
    assert set(found) == {(1, True, 11), (2, True, 11), (3, True, 11), (2, False, 23), (3, False, 23)}
    assert found[1, True, 11] == pytest.approx(2000, rel=1e-3)
    states: list[Tensor] = []
    handle = model.model.layers[2].register_forward_hook(lambda _, args, output: states.append(output))
    for prompt in prompts():
        logits(model, {"input_ids": torch.tensor([prompt.token_ids])})
    handle.remove()
    mean = float(torch.cat(states)[:, 6, 23].double().mean())
    assert mean < -500
    assert found[2, False, 23] == pytest.approx(mean, rel=1e-12)
    assert method.edited_layers == (1,)
    assert replace(method, layers="all").edited_layers == (1, 2, 3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("to", ["zero", "mean"])
def test_entries_are_overwritten_where_they_are(side: str, to: Any) -> None:
    """Layer 2, where both kinds of tokens have an entry, against a hook that knows where they were planted."""
    model, given = planted(), padded(side)
    method = replace(MassiveActivations(to=to).calibrated(model, prompts()), layers=[2])
    means = {(first, dim): value for layer, first, dim, value in method.means if layer == 2}
    real = given["attention_mask"] != 0
    before, plain = state(model), logits(model, given)
    with method(model) as effect:
        found = logits(model, given)
    assert state(model) == before
    assert torch.equal(logits(model, given), plain)

    def by_hand(_module: Any, _args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        for row in range(3):
            bos, comma = (int((given["input_ids"][row] == token).nonzero()[0]) for token in (BOS, COMMA))
            output[row, bos, 11] = means[True, 11] if to == "mean" else 0.0
            output[row, comma, 23] = means[False, 23] if to == "mean" else 0.0
        return output

    handle = model.model.layers[2].register_forward_hook(by_hand)
    expected = logits(model, given)
    handle.remove()
    assert torch.equal(found[real], expected[real])
    assert effect.by_layer[2][0] == 6
    if to == "zero":
        assert effect.largest > 1000
        assert not torch.allclose(found[real], plain[real], atol=1e-2)


def test_a_starting_token_is_not_given_another_tokens_mean() -> None:
    """A prompt that begins with the comma: the kind `starting token, dim 23` was never seen, so it is left alone."""
    model = planted()
    method = replace(MassiveActivations(to="zero").calibrated(model, prompts()), layers=[2])
    ids = torch.tensor([prompts()[0].token_ids])
    ids[0, 0] = COMMA
    with method(model) as effect:
        logits(model, {"input_ids": ids})
    assert effect.by_layer[2][0] == 1


def test_generated_tokens_are_edited_like_a_fresh_prompt() -> None:
    """A comma that is generated, or fed token by token, is found in the continuation too."""
    model, ids = planted(), torch.tensor([p.token_ids for p in prompts(2)])
    ids[:, -1] = COMMA
    method = replace(MassiveActivations(to="zero").calibrated(model, prompts()), layers="all")
    with torch.no_grad(), method(model) as effect:
        whole = model(ids).logits[:, -1]
        count = effect.edited
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        row = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(row, whole, rtol=0, atol=1e-4)
    assert effect.edited == 2 * count
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        with pytest.raises(ModelError, match="middle of an input"), method(model):
            model(ids[:, -1:], past_key_values=cache)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_control_zeroes_as_many_entries_of_median_magnitude(side: str) -> None:
    model, given = planted(), padded(side)
    method = replace(MassiveActivations(to="zero").calibrated(model, prompts()), layers=[2])
    kept: list[Tensor] = []
    handle = model.model.layers[3].register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    logits(model, given)
    (control,) = method.controls()
    with control(model) as effect:
        logits(model, given)
    handle.remove()
    plain, edited = kept
    for row, real in enumerate(given["attention_mask"] != 0):
        size = plain[row][real].abs().flatten()
        nearest = (size - size.median()).abs().argsort(stable=True)[:2]
        expected = plain[row][real].flatten().index_fill(0, nearest, 0.0)
        assert torch.equal(edited[row][real].flatten(), expected)
    assert effect.edited == 6
    assert effect.largest < 2


def test_the_bundled_model_needs_the_size_and_not_the_variation() -> None:
    """The finding of Sun et al. on a model in which the entries emerged: 0 hurts, the mean and the control do not."""
    opened = open_model("bundled:dense-ind", dtype="fp32")
    module: Any = opened.module
    ids = held_out(recipes["dense-ind"], 48)
    some = [Prompt(i, tuple(row), tuple(map(str, row)), "") for i, row in enumerate(ids[:16].tolist())]
    method = MassiveActivations(absolute=5, relative=50).calibrated(opened, some)
    assert [row[:3] for row in method.means if row[0] == 0] == [(0, True, 25)]

    def loss() -> float:
        with torch.no_grad():
            return float(module(input_ids=ids[16:], labels=ids[16:], use_cache=False).loss)

    plain = loss()
    found = {}
    for name, variant in {
        "zero": replace(method, to="zero"),
        "mean": method,
        "control": method.controls()[0],
    }.items():
        with variant(opened) as effect:
            found[name] = loss() - plain
        assert effect.edited == 32
    assert found["zero"] > 0.5
    assert abs(found["mean"]) < 1e-4
    assert abs(found["control"]) < 1e-3


def test_a_model_without_massive_activations_is_told_so() -> None:
    model = build("llama")
    method = MassiveActivations().calibrated(model, prompts())
    assert method.means == ()
    with pytest.warns(NothingEdited, match="nothing to edit"), method(model) as effect:
        logits(model, inputs("llama"))
    assert not effect.acted
    with pytest.raises(ModelError, match="calibration found no massive activation"):
        effect.require()


def test_post_layernorm_blocks_are_edited_before_their_norm() -> None:
    model, given = build("bert_mlm"), inputs("bert_mlm")
    method = MassiveActivations(means=[(1, False, 3, 9.0)], absolute=0.5, relative=0.0, layers=[1])
    kept: list[Tensor] = []
    norm = model.bert.encoder.layer[1].output.LayerNorm
    with method(model) as effect:
        handle = norm.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        logits(model, given)
        handle.remove()
    assert effect.acted
    assert int((kept[0][..., 3] == 9.0).sum()) == effect.edited


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"to": "median"}, "to must be"),
        ({"absolute": -1.0}, "absolute must be a number of at least 0"),
        ({"relative": float("nan")}, "relative must be"),
        ({"layers": "last"}, "layers must be"),
        ({"means": [(0, True, 1, 2.0), (0, True, 1, 3.0)]}, "two means"),
        ({"means": [(0, True, 1, 2.0)], "layers": [2]}, r"after layer \[2\]"),
    ],
)
def test_bad_parameters_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        MassiveActivations(**fields)


def test_means_of_another_model_and_no_prompts_are_refused() -> None:
    with (
        pytest.raises(UsageError, match="another model"),
        MassiveActivations(means=[(9, True, 1, 5.0)])(build("llama")),
    ):
        pass
    with pytest.raises(UsageError, match="no prompts"):
        MassiveActivations().calibrated(build("llama"), [])
