"""Expert pruning against zeroed weights, and what it does to a sink that emerged."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sinklens.core.errors import ModelError, UsageError
from sinklens.mitigations import ExpertPruning, NothingEdited
from sinklens.models.opening import open_model
from sinklens.testbeds.measure import read
from sinklens.testbeds.recipe import recipes
from sinklens.testbeds.train import held_out

from ..families import EXPERTS, FAMILIES, build, inputs
from .test_with import logits, state

MOE = [name for name, family in FAMILIES.items() if family.moe]
PRUNED = [(2, 0), (2, 3), (3, 5), (3, 7)]


def zeroed(model: Any, pairs: list[tuple[int, int]]) -> None:
    """The plainest form: the experts' down projections, and their biases, become 0."""
    with torch.no_grad():
        for layer, expert in pairs:
            experts = model.model.layers[layer].mlp.experts
            experts.down_proj[expert] = 0
            if getattr(experts, "down_proj_bias", None) is not None:
                experts.down_proj_bias[expert] = 0


@pytest.mark.parametrize("family", MOE)
def test_pruning_equals_a_zeroed_down_projection(family: str) -> None:
    model, given = build(family), inputs(family, padding="left")
    plain, before = logits(model, given), state(model)
    real = given["attention_mask"] != 0
    with ExpertPruning(experts=PRUNED)(model) as effect:
        found = logits(model, given)
    assert state(model) == before
    assert torch.equal(logits(model, given), plain)
    zeroed(model, PRUNED)
    torch.testing.assert_close(found[real], logits(model, given)[real], rtol=0, atol=2e-5)
    assert not torch.allclose(found[real], plain[real], atol=1e-3)
    assert effect.acted
    assert "routed rows in layers 2, 3" in effect.verdict


def test_it_holds_in_generation() -> None:
    model, given = build("qwen3_moe"), inputs("qwen3_moe", padding="left")
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    with ExpertPruning(experts=PRUNED)(model):
        found = model.generate(**given, **options)
    zeroed(model, PRUNED)
    assert torch.equal(found, model.generate(**given, **options))


def test_offloaded_weights_are_pruned_like_others() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, given = build("qwen3_moe"), inputs("qwen3_moe")
    with ExpertPruning(experts=PRUNED)(model):
        expected = logits(model, given)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.model.layers[2].mlp.experts.parameters()).is_meta
    with ExpertPruning(experts=PRUNED)(model):
        found = logits(model, given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "llama"])
def test_projections_are_pruned_too(family: str) -> None:
    model, given = build(family), inputs(family)
    with ExpertPruning(projections=[2])(model) as effect:
        found = logits(model, given)
    assert effect.largest > 0
    mlp = model.model.layers[2].mlp
    shared = getattr(mlp, "shared_expert", None) or getattr(mlp, "shared_experts", None) or mlp
    with torch.no_grad():
        shared.down_proj.weight.zero_()
    torch.testing.assert_close(found, logits(model, given), rtol=0, atol=1e-6)


def shares(model: Any, ids: Tensor) -> tuple[float, float, float]:
    """Largest mean attention of a head on BOS, the mean of all heads, and how much larger BOS is than the others."""
    found = read(model, ids)
    return (
        float(found.received().mean(1).max()),
        float(found.received().mean()),
        float(found.norm_ratio().max()),
    )


def test_the_causal_expert_of_the_bundled_model_carries_the_sink_and_its_controls_do_not() -> None:
    opened = open_model("bundled:moe-ind", dtype="fp32")
    ids = held_out(recipes["moe-ind"], 16)
    largest, mean, size = shares(opened.module, ids)
    assert largest > 0.5
    assert size > 15
    pruning = ExpertPruning(experts=[(2, 2)])
    with pruning(opened) as effect:
        gone = shares(opened.module, ids)
    assert effect.acted
    assert gone[0] < 0.2
    assert gone[1] < 0.5 * mean
    assert gone[2] < 2
    controls = (*pruning.random_controls(opened), *pruning.layer_matched_controls(opened))
    assert len(controls) == 10
    for control in controls:
        with control(opened):
            left = shares(opened.module, ids)
        assert left[0] > 0.9 * largest
        assert left[1] > 0.95 * mean
        assert left[2] > 0.9 * size


def named(pruning: ExpertPruning) -> Collection[tuple[int, int]]:
    assert pruning.experts is not None
    assert not isinstance(pruning.experts, str)
    return pruning.experts


def test_controls_are_as_many_others() -> None:
    model = build("mixtral")
    pruning = ExpertPruning(experts=[(1, 0), (1, 2), (3, 4)])
    random = pruning.random_controls(model, draws=7, seed=3)
    assert random == pruning.random_controls(model, draws=7, seed=3)
    assert len(set(random)) == 7
    matched = pruning.layer_matched_controls(model, draws=7)
    for control in (*random, *matched):
        assert len(named(control)) == 3
        assert not set(named(control)) & set(named(pruning))
    assert all([layer for layer, _ in named(control)] == [1, 1, 3] for control in matched)
    assert {layer for control in random for layer, _ in named(control)} > {1, 3}
    few = ExpertPruning(experts=[(0, 0)]).layer_matched_controls(model, among=[(0, 0), (0, 1), (0, 2)])
    assert {control.experts for control in few} == {((0, 1),), ((0, 2),)}
    rest = [(1, expert) for expert in range(EXPERTS - 1)]
    with pytest.raises(UsageError, match="7 other experts are needed as a control, 1 are left in layer 1"):
        ExpertPruning(experts=rest).layer_matched_controls(model)


@pytest.mark.parametrize(
    ("family", "pruning", "error", "told"),
    [
        ("llama", {"experts": [(0, 0)]}, ModelError, "has no experts, so there is nothing to edit"),
        ("mixtral", {"experts": [(9, 0)]}, UsageError, "there is no layer 9"),
        ("mixtral", {"experts": [(0, EXPERTS)]}, UsageError, f"no expert {EXPERTS}"),
        ("qwen2_moe", {"experts": [(0, 1)]}, ModelError, "layer 0 has no experts"),
        ("mixtral", {"projections": [0]}, ModelError, "layer 0 has no dense or shared down projection"),
    ],
)
def test_what_the_model_lacks_is_refused(
    family: str, pruning: dict[str, Any], error: type[Exception], told: str
) -> None:
    model = build(family)
    before = state(model)
    with pytest.raises(error, match=told), ExpertPruning(**pruning)(model):
        pass
    assert state(model) == before


def test_nothing_to_prune_is_said() -> None:
    with pytest.raises(UsageError, match="nothing to edit"):
        ExpertPruning(experts=[])
    model = build("qwen3_moe")
    given = {"input_ids": torch.tensor([[1]])}
    chosen: list[Tensor] = []
    hook = model.model.layers[1].mlp.experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
    logits(model, given)
    hook.remove()
    other = int(np.setdiff1d(np.arange(EXPERTS), chosen[0].numpy())[0])
    with (
        pytest.warns(NothingEdited, match="none was routed"),
        ExpertPruning(experts=[(1, other)])(model) as effect,
    ):
        logits(model, given)
    with pytest.raises(ModelError, match="did not act"):
        effect.require()
