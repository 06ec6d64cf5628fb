"""What mitigations refuse, and what their classes say of themselves."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from sinklens.core.errors import DataError, ModelError, UsageError
from sinklens.mitigations import (
    ACT,
    AttentionScaling,
    KnockOut,
    Mitigation,
    ZeroTuning,
    registry,
)

from ..families import BOS, HEADS, LAYERS, build, inputs
from .dense import places, rewritten, scaled_map
from .test_with import logits, state


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ZeroTuning(gamma=0.0), "gamma must be a number above 0, got 0.0"),
        (lambda: ZeroTuning(gamma=-2.0), "gamma must be a number above 0"),
        (lambda: ZeroTuning(gamma=float("nan")), "gamma must be a number above 0, got nan"),
        (lambda: ZeroTuning(gammas={(0, 1): 0.0}), "gamma must be a number above 0"),
        (lambda: ZeroTuning(gammas=[(0, 1, 2.0), (0, 1, 3.0)]), "a head has two gammas"),
        (lambda: ZeroTuning(heads=[]), "heads is empty"),
        (lambda: ZeroTuning(recipe="codes"), "recipe must be"),  # type: ignore[arg-type]
        (lambda: ACT(beta=1.2), "beta must be from 0 to 1, got 1.2"),
        (lambda: ACT(alpha=0.0), "alpha must be a number above 0"),
        (lambda: ACT(threshold=-0.1), "threshold must be a number above 0"),
        (lambda: ACT(recipe="x"), "recipe must be"),  # type: ignore[arg-type]
        (lambda: KnockOut(positions=(-1,)), "positions must be token positions from 0 on"),
        (lambda: KnockOut(positions=()), "positions must be"),
        (lambda: AttentionScaling(factor=-1.0), "factor must be a number of at least 0"),
    ],
)
def test_bad_parameters_are_refused(make: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        make()


@pytest.mark.parametrize(
    ("mitigation", "told"),
    [
        (KnockOut(layers=[LAYERS]), "there is no layer 4.\nThe model has layers 0 to 3"),
        (KnockOut(heads=[(0, HEADS)]), "there is no head 4.\nThe model has heads 0 to 3"),
        (KnockOut(shared_heads=[7]), "there is no head 7"),
        (ZeroTuning(gammas={(9, 0): 2.0}), "there is no layer 9"),
        (KnockOut(heads=[(0, 1)], layers=[2]), "none of the heads asked for"),
    ],
)
def test_heads_that_the_model_lacks_are_refused(mitigation: Mitigation, told: str) -> None:
    model = build("llama")
    before = state(model)
    with pytest.raises(UsageError, match=told), mitigation(model):
        pass
    assert state(model) == before


def test_models_outside_of_the_registry_are_refused() -> None:
    with (
        pytest.raises(ModelError, match="Key knock-out cannot be put on this model"),
        KnockOut()(build("bloom")),
    ):
        pass


def test_act_refuses_to_begin_in_the_middle() -> None:
    model, given = build("llama"), inputs("llama")
    with torch.no_grad():
        cache = model(**given).past_key_values
        more = torch.full((2, 1), BOS)
        with pytest.raises(ModelError, match="middle of an input"), ACT()(model):
            model(more, past_key_values=cache)


def test_a_mask_that_is_too_short_is_refused() -> None:
    model, given = build("llama"), inputs("llama", padding="left")
    with torch.no_grad():
        cache = model(**given).past_key_values
        with pytest.raises(DataError, match="does not cover"), KnockOut()(model):
            model(torch.full((2, 1), BOS), attention_mask=torch.ones(2, 1), past_key_values=cache)


def test_a_gradient_is_refused() -> None:
    model, given = build("llama"), inputs("llama")
    with pytest.raises(UsageError, match="no gradient"), KnockOut()(model):
        model(**given)


def test_dropout_is_refused() -> None:
    model, given = build("llama"), inputs("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.25
    model.train()
    with torch.no_grad(), pytest.raises(ModelError, match="Layer 0 drops 25%"), KnockOut()(model):
        model(**given)


def test_act_leaves_out_the_first_two_layers_and_the_last() -> None:
    model, given = build("llama"), inputs("llama")
    with ACT(alpha=1.0)(model) as effect:
        logits(model, given)
    assert list(effect.by_layer) == [2]
    with ACT(alpha=1.0, heads=[(0, 1), (3, 2)])(model) as effect:
        logits(model, given)
    assert list(effect.by_layer) == [0, 3]


def test_a_model_too_shallow_for_act_is_told_what_to_do() -> None:
    refused = pytest.raises(UsageError, match=r"The model has 2 layers of 4 heads\.\nGive layers")
    with refused, ACT()(build("clip").text_model):
        pass


def test_double_precision_is_kept() -> None:
    """What the heads of the first layer write, to 1e-12; later layers have norms in single precision."""
    model, given = build("llama", dtype=torch.float64), inputs("llama", batch=2, length=13, padding="left")
    real, found = given["attention_mask"] != 0, []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with rewritten(
        model, lambda _, weights: scaled_map(weights, places(real, 0)[:, None], 0.0, spare_own=True), real
    ):
        logits(model, given)
    with KnockOut()(model):
        logits(model, given)
    torch.testing.assert_close(found[1][real], found[0][real], rtol=0, atol=1e-12)


def test_mitigations_are_frozen_and_can_be_compared() -> None:
    one, same = (
        ZeroTuning(gammas={(1, 0): 2.0}, layers=range(2)),
        ZeroTuning(gammas=[(1, 0, 2.0)], layers=(1, 0)),
    )
    assert one == same
    assert hash(one) == hash(same)
    assert one.parameters["gammas"] == ((1, 0, 2.0),)
    with pytest.raises(FrozenInstanceError):
        one.gamma = 3.0  # type: ignore[misc]


@pytest.mark.parametrize("name", list(registry))
def test_every_method_says_what_it_is(name: str) -> None:
    cls = registry[name]
    text = inspect.getdoc(cls) or ""
    for paragraph in ("How it is computed:", "Compared with the paper:", "When not to trust it:", "Args:"):
        assert paragraph in text
    assert cls.name == name
    assert cls.title
    assert ElementTree.fromstring(cls.formula).tag == "math"
    reference = cls.reference
    assert reference.arxiv
    assert reference.section
    assert str(reference.year) in reference.bibtex


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(UsageError, match="zero-tuning"):
        registry["zero-tunning"]
