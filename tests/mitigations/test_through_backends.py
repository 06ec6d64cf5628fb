"""What moves attention in transformers moves it as far through hooks of a bridge and inside traces of nnsight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sinklens as sl
from sinklens.core.errors import DataError, ModelError, UsageError
from sinklens.mitigations import ACT, ZeroTuning
from sinklens.tracers.backends import open_with
from sinklens.tracers.batch import first_tensor, forward
from tests.families import build, tokenizer
from tests.tracers.agreement import WRAPPED, State, batch_of
from tests.tracers.test_nnsight import wrapped
from tests.tracers.test_transformer_lens import bridge

pytestmark = pytest.mark.filterwarnings("ignore")

METHODS = {
    "zero-tuning": ZeroTuning(gamma=3.0, layers=(1, 2)),
    "some heads": ZeroTuning(gamma=0.2, heads=((0, 1), (3, 2))),
    "act": ACT(threshold=0.08, layers=(1, 2, 3)),
}


def logits_of(family: str, method: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Through transformers: without and with the method, and its effect."""
    model, batch = build(family), batch_of(family)
    plain = first_tensor(forward(model, batch))
    with method(model) as effect:
        edited = first_tensor(forward(model, batch))
    return plain, edited, effect


def real(difference: torch.Tensor, family: str) -> float:
    valid = batch_of(family).valid
    assert valid is not None
    return float(difference[valid].abs().max())


@pytest.mark.parametrize("family", [*WRAPPED, "bert_mlm"])
def test_hooks_of_a_bridge_give_the_logits_of_transformers(family: str) -> None:
    method, held, batch = METHODS["zero-tuning"], bridge(family), batch_of(family)
    plain, edited, effect = logits_of(family, method)
    given = {"attention_mask": batch.inputs["attention_mask"]}
    with torch.no_grad():
        forward(held.original_model, batch)
        state = State(held.original_model)
        with sl.tl.hooks(method, held) as applied:
            ours = held.run_with_hooks(batch.inputs["input_ids"], fwd_hooks=applied.fwd_hooks, **given)
        after = held(batch.inputs["input_ids"], **given)
    assert real(edited - plain, family) > 0.1
    assert real(edited - ours, family) < 1e-5
    assert real(after - plain, family) < 1e-5
    assert applied.effect.rows_edited == effect.rows_edited
    assert state.changed(held.original_model) == []


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_every_kind_of_method_passes_through_both(family: str, name: str) -> None:
    method, batch = METHODS[name], batch_of(family)
    plain, edited, _ = logits_of(family, method)
    held = bridge(family)
    with torch.no_grad(), sl.tl.hooks(method, held) as applied:
        ours = held.run_with_hooks(
            batch.inputs["input_ids"],
            attention_mask=batch.inputs["attention_mask"],
            fwd_hooks=applied.fwd_hooks,
        )
    assert real(edited - plain, family) > 1e-3
    assert real(edited - ours, family) < 1e-5
    model = wrapped(family)
    with torch.no_grad(), sl.nns.on(method, model), model.trace(**batch.inputs):
        theirs = model.output.logits.save()
    assert real(edited - theirs, family) < 1e-5


def test_a_mitigation_on_a_bridge_is_not_measured_around() -> None:
    held = bridge("llama")
    with (
        sl.tl.hooks(METHODS["zero-tuning"], held),
        pytest.raises(ModelError, match="cannot be measured while a mitigation"),
    ):
        sl.profile(held, tokenizer=tokenizer(), prompts=["the fox " * 30], verify=False)


def test_cached_keys_are_refused() -> None:
    held, ids = bridge("llama"), batch_of("llama").inputs["input_ids"][:1]
    with torch.no_grad():
        _, cache = held(ids, return_type="logits_and_cache", use_cache=True)
        with (
            sl.tl.hooks(METHODS["zero-tuning"], held) as applied,
            pytest.raises(ModelError, match="in a cache"),
        ):
            held.run_with_hooks(ids[:, :1], past_key_values=cache, fwd_hooks=applied.fwd_hooks)


def test_families_without_vectors_at_hooks_are_refused() -> None:
    with (
        pytest.raises(ModelError, match="cannot be put on"),
        sl.tl.hooks(METHODS["zero-tuning"], bridge("bloom")),
    ):
        pass


@pytest.fixture(scope="module")
def found() -> tuple[Any, Any, torch.Tensor]:
    """A bridge around the bundled checkpoint, its run, and its prompts."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    from sinklens.models.opening import open_model

    opened = open_model(None, dtype="fp32")
    module: Any = opened.module
    held = build_bridge_from_module(module, type(module).__name__, hf_config=module.config)
    run = sl.profile(held, tokenizer=opened.tokenizer, n=3, seq_len=64, verify=False)
    return held, run, torch.tensor([record.token_ids for record in run.trace.records])


def test_places_of_findings_are_names_and_indices_of_a_cache(found: Any) -> None:
    held, run, tokens = found
    places = sl.tl.places(run)
    _, cache = held.run_with_cache(tokens, names_filter=sl.tl.names(run))
    assert set(sl.tl.names(run)) == set(cache.keys())
    heads = [place for place in places if place.finding == "primary-sinks"]
    assert len(heads) == run.primary_sinks.rows[0]["n_heads"]
    for place in heads:
        layer, head = int(place.hook.split(".")[1]), place.index[1]
        ours = [record.arrays["attention_received"][layer, head, 0] for record in run.trace.records]
        theirs = place.of(cache).mean(-1)
        assert theirs.tolist() == pytest.approx(ours, abs=1e-5)
    (writer,) = [place for place in places if place.finding == "writers"]
    assert float(writer.of(cache).mean()) == pytest.approx(run.writers.rows[0]["value"], rel=0.01)


def test_patching_the_sink_ends_it_and_patching_a_control_does_not(found: Any) -> None:
    held, run, tokens = found
    rows = sl.tl.patch_sink(run, held, tokens)
    assert [row["layer"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["sink_share"] < 0.3 * row["share_before"]
        assert row["control_share"] == pytest.approx(row["share_before"], abs=0.03)
    with pytest.raises(DataError, match="too short"):
        sl.tl.patch_sink(run, held, tokens[:, :2])


def test_entries_are_overwritten_by_an_edit_of_nnsight() -> None:
    model, batch = wrapped("llama"), batch_of("llama")
    edited = sl.nns.set_entries(model, [(1, 0, 5), (1, 2, 7), (2, 0, 3)], 9.0)
    with torch.no_grad():
        with edited.trace(**batch.inputs):
            first = edited.model.layers[1].output.save()
            second = edited.model.layers[2].output.save()
        with model.trace(**batch.inputs):
            plain = model.model.layers[1].output.save()
    assert first[:, 0, 5].tolist() == first[:, 2, 7].tolist() == second[:, 0, 3].tolist() == [9.0, 9.0]
    assert 9.0 not in plain[:, 0, 5].tolist()
    assert int((first != plain).sum()) == 4
    with pytest.raises(UsageError, match="no entry"):
        sl.nns.set_entries(model, [(9, 0, 0)])


def test_the_other_librarys_model_is_refused() -> None:
    with pytest.raises(ModelError, match="Expected a TransformerBridge"):
        sl.tl.hooks(METHODS["zero-tuning"], wrapped("llama")).__enter__()
    with pytest.raises(ModelError, match="Expected a model of nnsight"):
        sl.nns.set_entries(bridge("llama"), [(0, 0, 0)])


def test_a_recipe_gives_the_same_logits_and_belongs_to_one_model() -> None:
    recipes = pytest.importorskip("sinklens.mitigations.recipes")
    family, batch = "llama", batch_of("llama")
    recipe = recipes.recipe_for(METHODS["zero-tuning"], open_with(build(family)))
    plain, edited, _ = logits_of(family, recipe)
    held, model = bridge(family), wrapped(family)
    with torch.no_grad(), sl.tl.hooks(recipe, held) as applied:
        ours = held.run_with_hooks(
            batch.inputs["input_ids"],
            attention_mask=batch.inputs["attention_mask"],
            fwd_hooks=applied.fwd_hooks,
        )
    with torch.no_grad(), sl.nns.on(recipe, model), model.trace(**batch.inputs):
        theirs = model.output.logits.save()
    assert real(edited - plain, family) > 0.1
    assert real(edited - ours, family) < 1e-5
    assert real(edited - theirs, family) < 1e-5
    with pytest.raises(ModelError, match="not for this model"), sl.tl.hooks(recipe, bridge(family, seed=5)):
        pass
