"""Profiles of models with known truth: everything planted is found, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig, Qwen3MoeConfig

import sinklens
from sinklens.analyzers import Status
from sinklens.pipeline.run import Run
from sinklens.testbeds import (
    MassivePlant,
    SinkPlant,
    SuperExpertPlant,
    plant,
    random_control,
    uniform_control,
)

SEEDS = range(4)
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


def llama() -> LlamaConfig:
    return LlamaConfig(**COMMON, intermediate_size=112)


def moe() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        **COMMON,
        intermediate_size=112,
        moe_intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=2,
    )


def prompts(seed: int, at: int = 0, n: int = 5) -> list[list[int]]:
    """Random tokens of several lengths (so that batches are padded) with the BOS token at one position."""
    generator = np.random.default_rng(seed)
    made = [generator.integers(3, VOCAB, size=48 + 5 * i).tolist() for i in range(n)]
    for ids in made:
        ids[at] = 1
    return made


def profiled(model: Any, seed: int, at: int = 0, **options: Any) -> Run:
    return sinklens.profile(model, prompts=prompts(seed, at), **options)


def heads(run: Run) -> set[tuple[int, int]]:
    return {(layer, head) for layer, head, _ in run.primary_sinks.summary["heads"]}


@pytest.mark.parametrize("mode", ["faithful", "fused"])
@pytest.mark.parametrize("seed", SEEDS)
def test_everything_planted_in_a_llama_is_found_and_nothing_else(seed: int, mode: str) -> None:
    model = random_control(llama(), seed)
    truth = plant(
        model,
        sinks=[SinkPlant(heads=[(2, 0), (3, 3), (4, 2)])],
        massive=[MassivePlant(dim=5 + seed, layer_in=1, layer_out=4)],
    )
    run = profiled(model, seed, mode=mode)
    assert [(row["position"], row["token_id"]) for row in run.primary_sinks.rows] == [(0, 1)]
    assert heads(run) == truth.head_set
    assert run.primary_sinks.summary["sink_rate"] == pytest.approx(100 * 3 / 24)
    places = {(row["layer"], row["position"], row["dim"]) for row in run.massive_activations.rows}
    assert places == {(layer, 0, 5 + seed) for layer in (1, 2, 3)}
    assert {row["written_at"] for row in run.massive_activations.rows} == {1}
    assert run.massive_activations.rows[0]["value"] == pytest.approx(500, rel=0.02)
    assert run.massive_activations.rows[0]["down_proj_output"] == pytest.approx(500, rel=0.02)
    assert run.super_experts.status is Status.NOT_APPLICABLE
    assert run.verdict.status == "sink"


@pytest.mark.parametrize("seed", SEEDS)
def test_everything_planted_in_a_mixture_is_found_and_nothing_else(seed: int) -> None:
    model = random_control(moe(), seed)
    truth = plant(
        model,
        sinks=[SinkPlant(heads=[(2, 0), (3, 3)])],
        super_experts=[SuperExpertPlant(layer=1, expert=(3 + seed) % 8, dim=5)],
    )
    run = profiled(model, seed)
    assert [row["position"] for row in run.primary_sinks.rows] == [0]
    assert heads(run) == truth.head_set
    assert {row["dim"] for row in run.massive_activations.rows} == {5}
    assert {row["layer"] for row in run.massive_activations.rows} == {1, 2, 3, 4, 5}
    found = [(row["layer"], row["expert"], row["position"], row["dim"]) for row in run.super_experts.rows]
    assert found == [(1, (3 + seed) % 8, 0, 5)]
    assert run.super_experts.rows[0]["share_of_sink_token"] == 1.0
    summary = run.super_experts.summary
    assert summary["sink_rate_with_all"] == pytest.approx(100 * 2 / 24)
    assert summary["sink_rate_without_them"] == 0.0
    assert summary["sink_rate_without_others"] == summary["sink_rate_with_all"]
    assert "Without it the sink's share" in run.super_experts.verdict
    assert "without_them" not in str(profiled(model, seed, verify=False).super_experts.summary)


@pytest.mark.parametrize("at", [3, 20])
def test_a_sink_in_the_middle_of_the_prompt_is_found_there(at: int) -> None:
    model = random_control(llama(), 0)
    truth = plant(
        model, sinks=[SinkPlant(heads=[(2, 0), (3, 3), (4, 2)])], massive=[MassivePlant(dim=5, layer_in=1)]
    )
    run = profiled(model, 0, at=at)
    assert [row["position"] for row in run.primary_sinks.rows] == [at]
    assert heads(run) == truth.head_set
    assert {row["position"] for row in run.massive_activations.rows} == {at}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("config", [llama, moe])
def test_random_models_have_nothing_to_find(config: Any, seed: int) -> None:
    run = profiled(random_control(config(), seed), seed)
    assert run.verdict.status == "no-sink"
    found = {name for name, finding in run.findings.items() if finding.status is Status.FOUND}
    assert found <= {"head-classes"}  # it sorts every head of every model


def test_uniform_attention_has_no_sink() -> None:
    run = profiled(uniform_control(llama(), 0), 0)
    assert run.verdict.status == "no-sink"
    assert run.primary_sinks.summary["share"] == pytest.approx(
        run.primary_sinks.summary["uniform_share"], rel=1e-4
    )
