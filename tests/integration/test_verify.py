"""Causal verification on models with known truth: the cause is named, the decoy is not, and nothing stays behind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, Qwen3MoeConfig

import sinklens
from sinklens.analyzers import Status
from sinklens.analyzers.causal_rules import CARRIES, DID_NOT_ACT, ELSEWHERE, NEED, NO_EFFECT, UNKNOWN
from sinklens.pipeline.run import Run
from sinklens.testbeds import MassivePlant, SinkPlant, SuperExpertPlant, plant, random_control

VOCAB = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ANALYZERS = ("primary-sinks", "massive-activations", "super-experts", "causal-effects")


def llama() -> LlamaConfig:
    return LlamaConfig(**COMMON, intermediate_size=112)


def moe() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        **COMMON, intermediate_size=112, moe_intermediate_size=48, num_experts=8, num_experts_per_tok=2
    )


def prompts(seed: int, at: int = 0, n: int = 5, decoy: int | None = None) -> list[list[int]]:
    """Random tokens of several lengths with BOS at one position and, if asked, a decoy token in the middle."""
    generator = np.random.default_rng(seed)
    made = [generator.integers(4, VOCAB, size=48 + 5 * i).tolist() for i in range(n)]
    for ids in made:
        ids[at] = 1
        if decoy is not None:
            ids[30] = decoy
    return made


def verified(model: nn.Module, given: Sequence[list[int]], **options: Any) -> Run:
    return sinklens.profile(model, prompts=given, verify=True, analyzers=ANALYZERS, **options)


def rows(run: Run) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in run.causal_effects.rows}


@pytest.mark.parametrize("at", [0, 20])
@pytest.mark.parametrize("mode", ["faithful", "fused"])
def test_the_planted_massive_activation_carries_the_planted_sink(mode: str, at: int) -> None:
    model = random_control(llama(), at)
    plant(
        model,
        sinks=[SinkPlant(heads=[(2, 0), (3, 3), (4, 2)])],
        massive=[MassivePlant(dim=7, layer_in=1)],
    )
    run = verified(model, prompts(3, at), mode=mode)
    found = rows(run)
    for name in ("massive-zero", "massive-held", "write-mlp-1"):
        assert found[name]["verdict"] == CARRIES
        assert found[name]["sink_lost"] == pytest.approx(1.0, abs=0.05)
        assert found[name]["control_sink_lost"] == pytest.approx(0.0, abs=0.05)
        assert found[name]["remains"] < 0.05
    assert found["massive-mean"]["sink_lost"] == pytest.approx(0.0, abs=0.05)
    for name in ("write-mlp-0", "write-mlp-2", "write-attention-1"):
        assert found[name]["sink_lost"] == pytest.approx(0.0, abs=0.05)
    assert found[f"key-{at}"]["d_sink"] == 1.0
    assert run.causal_effects.status is Status.FOUND
    assert run.causal_effects.verdict.startswith("What carries the sink")


@pytest.mark.parametrize("seed", range(4))
def test_the_ranking_by_effect_names_the_right_expert_where_size_names_a_decoy(seed: int) -> None:
    """The decoy writes three times as much, on a token and a dim that no head reads."""
    model = random_control(moe(), seed)
    true, decoy = (1, (3 + seed) % 8), (2, (5 + 3 * seed) % 8)
    plant(
        model,
        sinks=[SinkPlant(heads=[(3, 0), (4, 3)])],
        super_experts=[
            SuperExpertPlant(layer=true[0], expert=true[1], dim=5),
            SuperExpertPlant(layer=decoy[0], expert=decoy[1], dim=11, magnitude=1500.0, token=3),
        ],
    )
    run = verified(model, prompts(seed, decoy=3))
    finding = run.super_experts
    assert (finding.rows[0]["layer"], finding.rows[0]["expert"]) == decoy
    ranking = finding.summary["causal_ranking"]
    assert (ranking[0]["layer"], ranking[0]["expert"]) == true
    assert ranking[0]["verdict"] == CARRIES
    assert [row["verdict"] for row in ranking if (row["layer"], row["expert"]) == decoy] != [CARRIES]
    assert f"By effect the sink hangs on L{true[0]}E{true[1]}, number 2 by size" in finding.verdict
    assert f"not on the largest, L{decoy[0]}E{decoy[1]}" in finding.verdict
    of = {(row["layer"], row["expert"]): row for row in finding.rows}
    assert of[true]["without_it"] == CARRIES
    assert of[true]["sink_share_change"] < -0.05
    assert abs(of[decoy]["sink_share_change"]) < 0.005


class Restored:
    """A block after the writer that writes the massive entry again: clearing it once does not remove it."""

    def __init__(self, model: Any, layer: int, dim: int, value: float) -> None:
        def again(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[:, 0, dim] = value
            return output

        self.handle = model.model.layers[layer].register_forward_hook(again)


def test_an_entry_that_is_written_again_reads_as_not_removed() -> None:
    model = random_control(llama(), 0)
    plant(model, sinks=[SinkPlant(heads=[(3, 3), (4, 2)])], massive=[MassivePlant(dim=7, layer_in=1)])
    Restored(model, 2, 7, 500.0)
    run = verified(model, prompts(0))
    found = rows(run)
    assert found["massive-zero"]["verdict"] == "not removed: 100 % remains"
    assert found["massive-zero"]["direction_kept"] > 0.99
    assert found["massive-held"]["verdict"] == CARRIES
    assert any("does not show that the cause is irrelevant" in note for note in run.causal_effects.notes)


def test_a_sink_that_does_not_read_the_massive_entry_is_said_to_do_without_it() -> None:
    model = random_control(llama(), 1)
    plant(
        model,
        sinks=[SinkPlant(heads=[(0, 0), (1, 3)])],
        massive=[MassivePlant(dim=7, layer_in=2)],
    )
    found = rows(verified(model, prompts(1)))
    assert found["massive-zero"]["verdict"] == NO_EFFECT
    assert found["massive-zero"]["remains"] < 0.05


def test_the_result_is_plain_json_the_same_twice_and_nothing_stays_on_the_model() -> None:
    model = random_control(moe(), 0)
    plant(
        model,
        sinks=[SinkPlant(heads=[(2, 0), (3, 3)])],
        super_experts=[SuperExpertPlant(layer=1, expert=3, dim=5)],
    )
    given = prompts(0)
    ids = torch.tensor([given[0]])
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    before = model(input_ids=ids).logits
    one, two = (verified(model, given).trace.manifest["experiments"]["effects"] for _ in range(2))
    assert json.dumps(one, allow_nan=False) == json.dumps(two, allow_nan=False)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


def test_one_prompt_gives_effects_without_intervals() -> None:
    model = random_control(llama(), 0)
    plant(model, sinks=[SinkPlant(heads=[(2, 0), (3, 3)])], massive=[MassivePlant(dim=7, layer_in=1)])
    run = verified(model, prompts(0, n=1))
    row = rows(run)["massive-zero"]
    assert row["verdict"] == CARRIES
    assert row["sink_lost_low"] is None
    assert rows(run)["massive-mean"]["verdict"] == DID_NOT_ACT
    assert any("1 prompts" in note or "Only 1" in note for note in run.causal_effects.notes)


def test_the_predictions_are_compared_in_nats() -> None:
    """A head that copies is needed; the numbers are those of the two models run by hand."""
    model = random_control(llama(), 0)
    plant(model, sinks=[SinkPlant(heads=[(2, 0), (3, 3)])], massive=[MassivePlant(dim=7, layer_in=1)])
    given = prompts(0, n=1)
    run = verified(model, given)
    found = rows(run)["massive-zero"]
    ids = torch.tensor(given)

    def clear(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, 0, 7] = 0
        return output

    with torch.no_grad():
        base = model(input_ids=ids).logits[0].double().log_softmax(-1)
        handle = model.model.layers[1].register_forward_hook(clear)
        edited = model(input_ids=ids).logits[0].double().log_softmax(-1)
        handle.remove()
    kl = (base.exp() * (base - edited)).sum(-1).mean()
    loss = (base - edited)[:-1].gather(-1, ids[0, 1:, None]).mean()
    assert found["kl"] == pytest.approx(float(kl), rel=1e-4, abs=1e-7)
    assert found["loss_change"] == pytest.approx(float(loss), rel=1e-3, abs=1e-6)


def encoder() -> BertModel:
    """A post-LayerNorm encoder whose first token carries a mark (dim 9) from the embedding on. The feed-forward part
    of block 0 blows the mark up, and a head in block 1 and one in block 2 attend to whoever has it."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80
    )
    model: Any = BertModel(config).eval()
    with torch.no_grad():
        model.embeddings.position_embeddings.weight[0, 9] = 5.0
        up, down = model.encoder.layer[0].intermediate.dense, model.encoder.layer[0].output.dense
        up.weight[7], up.bias[7] = 0.0, -4.0
        up.weight[7, 9] = 1.0
        down.weight[9, 7] = 60.0
        for layer, head in ((1, 0), (2, 3)):
            attention = model.encoder.layer[layer].attention.self
            attention.key.weight[12 * head, 9] = 3.0
            attention.query.bias[12 * head] = 3.0
    return model


def test_in_a_post_norm_encoder_a_cleared_write_is_not_a_removed_entry() -> None:
    """Without the write the mark itself is left, and the norm makes as much of it: the sink stays. Only clearing what
    the norm reads removes it. There is no language head, so there is nothing to say of predictions."""
    run = verified(encoder(), prompts(0))
    assert run.massive_activations.rows == []
    assert run.massive_activations.summary["max_ratio"] > 50
    found = rows(run)
    assert found["massive-zero"]["verdict"] == CARRIES
    assert found["write-mlp-0"]["sink_lost"] < 0.1
    assert found["write-mlp-0"]["verdict"] == "not removed: 100 % remains"
    assert found["write-mlp-1"]["verdict"] == ELSEWHERE
    assert all(row["kl"] is None and row["loss_change"] is None for row in found.values())
    assert found["key-0"]["verdict"] == UNKNOWN
    assert "no language head" in run.causal_effects.verdict


def test_random_models_have_nothing_to_take_away() -> None:
    run = verified(random_control(llama(), 0), prompts(0))
    assert run.causal_effects.status is Status.NOT_APPLICABLE
    assert "nothing was found" in run.causal_effects.verdict


@pytest.mark.parametrize("name", ["bundled:moe-ind", "bundled:dense-ind"])
def test_the_bundled_checkpoints_end_to_end(name: str) -> None:
    run = sinklens.profile(name, verify=True, n=12)
    found = rows(run)
    assert found["key-0"]["predictions"] == NEED
    assert found["massive-zero"]["predictions"] == NEED
    if name == "bundled:moe-ind":
        assert found["expert-L2E2"]["verdict"] == CARRIES
        assert "expert L2E2" in run.causal_effects.verdict
        assert run.super_experts.rows[0]["without_it"] == CARRIES
    else:
        assert found["massive-zero"]["verdict"] == NO_EFFECT
