"""The chain on models with known truth: secondary sinks, writers, erasers and cascades are found, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig

import sinklens
from sinklens.analyzers import Status
from sinklens.pipeline.run import Run
from sinklens.testbeds import (
    MassivePlant,
    SecondaryPlant,
    SinkPlant,
    SuperExpertPlant,
    plant,
    random_control,
)

SEEDS = range(4)
VOCAB, BOS, JOINS = 97, 1, 41
CHAIN = (
    "primary-sinks",
    "secondary-sinks",
    "massive-activations",
    "writers",
    "expert-cascade",
    "bos-alignment",
)
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 9,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": BOS,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama() -> LlamaConfig:
    return LlamaConfig(**COMMON, intermediate_size=112)


def moe() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        **COMMON, intermediate_size=112, moe_intermediate_size=48, num_experts=8, num_experts_per_tok=2
    )


def prompts(seed: int, *, at: int = 0, joins: bool = True, n: int = 5) -> list[list[int]]:
    """Random tokens of several lengths with BOS at one place and, if asked, the joining token at another."""
    generator = np.random.default_rng(seed)
    free = [token for token in range(3, VOCAB) if token != JOINS]
    made = [generator.choice(free, size=47 + 6 * i).tolist() for i in range(n)]
    for ids in made:
        ids[at] = BOS
        if joins:
            ids[joined(ids, at)] = JOINS
    return made


def joined(ids: list[int], at: int = 0) -> int:
    """Where the joining token stands: differently in every prompt."""
    return at + 3 + len(ids) % 11


def profiled(model: Any, texts: list[list[int]], **options: Any) -> Run:
    return sinklens.profile(model, prompts=texts, analyzers=CHAIN, verify=False, **options)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_planted_secondary_sink_is_found_with_its_layer_and_lifetime(seed: int) -> None:
    created, lifetime = 3 + seed % 2, 2 + seed // 2
    model = random_control(llama(), seed)
    plant(
        model,
        sinks=[SinkPlant(heads=[(2, 0), (4, 3)])],
        massive=[MassivePlant(dim=5 + seed, layer_in=1)],
        secondary=[SecondaryPlant(created, token=JOINS, lifetime=lifetime)],
    )
    texts = prompts(seed)
    finding = profiled(model, texts, mode=["faithful", "fused"][seed % 2]).secondary_sinks
    assert {
        (row["position"], row["creation_layer"], row["lifetime"], row["type"]) for row in finding.rows
    } == {(joined(ids), created, lifetime, "secondary") for ids in texts}
    summary = finding.summary
    assert summary["n_secondary"] == len(texts)
    assert summary["per_1000_tokens"] == pytest.approx(1000 * 5 / sum(map(len, texts)))
    assert (summary["primary_position"], summary["active_first"], summary["active_last"]) == (0, 1, 8)
    assert summary["layers_unknown"] == 0
    assert summary["levels"] == [[created, lifetime, 5]]
    assert summary["n_written_by_mlp"] == summary["births_recorded"] == 5
    assert all(abs(row["cosine"]) > 0.98 for row in finding.rows)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_writing_and_the_erasing_block_are_found_in_a_dense_model(seed: int) -> None:
    first, last, dim = seed, 6 + seed % 3, 9 + seed
    model = random_control(llama(), seed)
    plant(
        model,
        sinks=[SinkPlant(heads=[(first + 1, 1)])],
        massive=[MassivePlant(dim=dim, layer_in=first, layer_out=last, magnitude=-600.0)],
    )
    run = profiled(model, prompts(seed))
    rows = [(r["position"], r["dim"], r["role"], r["layer"], r["sublayer"]) for r in run.writers.rows]
    assert rows == [(0, dim, "writes", first, "mlp"), (0, dim, "erases", last, "mlp")]
    assert run.writers.rows[0]["value"] == pytest.approx(-600, rel=0.02)
    assert run.writers.rows[0]["share"] == pytest.approx(1, abs=0.01)
    assert run.writers.rows[0]["neuron_share"] == pytest.approx(1, abs=0.01)
    assert run.writers.summary["largest_residue"] < 1e-4
    assert run.expert_cascade.status is Status.NOT_APPLICABLE
    assert run.secondary_sinks.rows == []


def test_two_blocks_that_each_write_a_part_are_two_steps() -> None:
    model: Any = random_control(llama(), 5)
    plant(model, massive=[MassivePlant(dim=7, layer_in=2)])
    # A neuron of a later block reads the dim, which is about 8 after the norm, and adds to it.
    later, neuron = model.model.layers[4].mlp, 30
    with torch.no_grad():
        for reader in (later.gate_proj, later.up_proj):
            reader.weight[neuron] = 0
            reader.weight[neuron, 7] = 1
        later.down_proj.weight[:, neuron] = 0
        later.down_proj.weight[7, neuron] = 800 / 64
    run = profiled(model, prompts(5))
    first, second = run.writers.rows
    assert (first["role"], first["layer"], first["sublayer"]) == ("writes", 2, "mlp")
    assert (second["role"], second["layer"], second["neuron"]) == ("writes", 4, neuron)
    assert first["value"] == pytest.approx(500, rel=0.02)
    assert 0.5 < second["share"] < 0.7
    assert first["share"] + second["share"] == pytest.approx(1, abs=0.01)
    assert "in 2 steps" in run.writers.verdict
    assert "never erased" in run.writers.verdict


@pytest.mark.parametrize("seed", SEEDS)
def test_the_cascade_of_a_mixture_names_writer_eraser_and_routing(seed: int) -> None:
    expert = (3 + seed) % 8
    model = random_control(moe(), seed)
    truth = plant(
        model,
        sinks=[SinkPlant(heads=[(3, 0)])],
        super_experts=[SuperExpertPlant(layer=1 + seed % 2, expert=expert, dim=11, layer_out=7)],
    )
    run = profiled(model, prompts(seed))
    cascade = run.expert_cascade
    found = [(row["role"], row["layer"], row["expert"], row["kind"]) for row in cascade.rows]
    assert truth.super_experts == ((1 + seed % 2, expert),)
    assert found == [
        ("first writer", *truth.super_experts[0], "routed"),
        ("erases", *truth.erasers[0], "routed"),
    ]
    writer, eraser = cascade.rows
    assert writer["share"] == pytest.approx(1, abs=0.02)
    assert eraser["share"] == pytest.approx(-1, abs=0.05)
    assert writer["chosen"] == 1.0
    assert writer["router_score"] > 0.99
    assert writer["router_score_others"] < 0.5
    by_writers = [(row["role"], row["layer"], row["expert"]) for row in run.writers.rows]
    assert by_writers == [("writes", *truth.super_experts[0]), ("erases", *truth.erasers[0])]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_secondary_sink_written_by_an_expert_is_found_too(seed: int) -> None:
    model = random_control(moe(), seed)
    plant(
        model,
        super_experts=[SuperExpertPlant(layer=1, expert=seed, dim=11)],
        secondary=[SecondaryPlant(4, token=JOINS, lifetime=3, expert=seed + 1)],
    )
    texts = prompts(seed)
    finding = profiled(model, texts).secondary_sinks
    assert {
        (row["position"], row["creation_layer"], row["lifetime"], row["type"]) for row in finding.rows
    } == {(joined(ids), 4, 3, "secondary") for ids in texts}
    assert finding.summary["n_written_by_mlp"] == len(texts)


@pytest.mark.parametrize("at", [4, 17])
def test_a_primary_sink_inside_the_prompt_is_followed_once_attention_leads_to_it(at: int) -> None:
    model = random_control(llama(), 0)
    plant(
        model,
        sinks=[SinkPlant(heads=[(2, 0), (2, 2), (3, 3), (4, 2)])],
        massive=[MassivePlant(dim=5, layer_in=1)],
        secondary=[SecondaryPlant(5, token=JOINS, lifetime=2)],
    )
    texts = prompts(3, at=at)
    run = profiled(model, texts)
    summary = run.secondary_sinks.summary
    assert summary["primary_position"] == at
    assert summary["layers_unknown"] > 0
    assert {
        (row["position"], row["creation_layer"], row["lifetime"]) for row in run.secondary_sinks.rows
    } == {(joined(ids, at), 5, 2) for ids in texts}
    assert {row["position"] for row in run.writers.rows} == {at}
    assert {(row["role"], row["layer"]) for row in run.writers.rows} == {("writes", 1)}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("config", [llama, moe])
def test_random_models_have_no_chain(config: Any, seed: int) -> None:
    run = profiled(random_control(config(), seed), prompts(seed))
    for name in ("secondary_sinks", "writers", "expert_cascade", "bos_alignment"):
        finding = getattr(run, name)
        assert finding.status is not Status.FOUND, name
        if name != "bos_alignment":
            assert finding.rows == [], name
            assert finding.reason, name


def test_the_bundled_mixture_has_a_cascade_on_its_first_token() -> None:
    run = sinklens.profile("bundled:moe-ind", analyzers=(*CHAIN, "super-experts"), verify=False)
    top = run.super_experts.rows[0]
    members = {(row["layer"], row["expert"]) for row in run.expert_cascade.rows}
    assert (top["layer"], top["expert"]) in members
    assert all(row["chosen"] > 0.9 and row["position"] == 0 for row in run.expert_cascade.rows)
    assert all(row["router_score"] > row["router_score_others"] for row in run.expert_cascade.rows)
    assert run.secondary_sinks.status is Status.NOT_FOUND


@pytest.mark.parametrize("checkpoint", ["dense-ind", "moe-ind"])
def test_a_second_first_token_inside_the_prompt_rises_with_the_primary_sink(checkpoint: str) -> None:
    """Trained, not planted: a second BOS takes the first one's state in the same block, and keeps it."""
    plain = sinklens.profile(f"bundled:{checkpoint}", n=4, analyzers=("bos-alignment",), verify=False)
    texts = [record.token_ids.tolist() for record in plain.trace]
    for ids in texts:
        ids[24] = ids[0]
    finding = sinklens.profile(
        f"bundled:{checkpoint}", prompts=texts, analyzers=("secondary-sinks",), verify=False
    ).secondary_sinks
    (row,) = finding.rows
    assert (row["position"], row["type"], row["n_prompts"]) == (24, "bos_sink", 4)
    assert row["creation_layer"] == finding.summary["active_first"]
    assert row["cosine"] > 0.99
    assert row["written_by_mlp"] is True
    assert row["down_cosine"] > 0.99
    assert finding.status is Status.NOT_FOUND
    assert "4 tokens rise together with it" in finding.verdict


def test_the_cascade_carries_the_measured_effect_of_its_experts() -> None:
    model = random_control(moe(), 0)
    plant(
        model,
        sinks=[SinkPlant(heads=[(3, 0), (4, 2)])],
        super_experts=[SuperExpertPlant(layer=1, expert=3, dim=11)],
    )
    run = sinklens.profile(model, prompts=prompts(0), analyzers=(*CHAIN, "super-experts"), verify=True)
    assert run.expert_cascade.rows[0]["sink_lost"] > 0.9
    assert run.expert_cascade.summary["largest_sink_lost_by"] == "L1E3"
