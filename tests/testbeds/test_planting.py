"""What was planted is there, exactly where the answer key says, and nowhere else.

Everything is read with plain hooks and eager attention (`measure.read`), never with the tracers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sinklens.testbeds import api
from sinklens.testbeds.measure import Reading, read, without_expert
from sinklens.testbeds.planting.plant import plant
from sinklens.testbeds.planting.truth import (
    MassivePlant,
    SecondaryPlant,
    SinkPlant,
    SuperExpertPlant,
    Target,
    Truth,
)

from .families import BOS, DENSE, DIMS, EXPERTS, HEADS, LAYERS, MOE, VOCABULARY, tiny

LENGTH = 53


def text(seed: int, prompts: int = 4, avoid: tuple[int, ...] = ()) -> torch.Tensor:
    """Random tokens with BOS first and nowhere else."""
    rng = np.random.default_rng(seed)
    free = [token for token in range(VOCABULARY) if token not in (BOS, *avoid)]
    ids = torch.tensor(rng.choice(free, size=(prompts, LENGTH)))
    ids[:, 0] = BOS
    return ids


def draw(seed: int) -> tuple[list[tuple[int, int]], int, int, int]:
    """Heads in later blocks (one per block), a dim, the writing block, an expert."""
    rng = np.random.default_rng(seed)
    block = int(rng.integers(0, 3))
    later = sorted(int(item) for item in rng.choice(np.arange(block + 1, LAYERS), size=2, replace=False))
    heads = [(item, int(rng.integers(HEADS))) for item in later]
    return heads, int(rng.integers(DIMS)), block, int(rng.integers(EXPERTS))


def check_heads(reading: Reading, truth: Truth, share: float = 0.99) -> None:
    """Planted heads sink from every query; no other head has even half of epsilon 0.3."""
    for layer in range(LAYERS):
        for head in range(HEADS):
            to_bos = reading.attention[layer, :, head, 1:, 0]
            if (layer, head) in truth.head_set:
                assert to_bos.min() > share, (layer, head)
            else:
                assert to_bos.mean() < 0.15, (layer, head)


def check_massive(reading: Reading, dim: int, first: int, end: int, magnitude: float) -> None:
    """The rule of Sun et al. holds at BOS in the given dim, in blocks `first..end-1`, and at nothing else."""
    for layer, state in enumerate(reading.states):
        size = state.abs()
        massive = (size > 100) & (size > 1000 * size.median())
        expected = torch.zeros_like(massive)
        if first <= layer < end:
            expected[:, 0, dim] = True
            torch.testing.assert_close(
                state[:, 0, dim], torch.full((len(state),), magnitude), rtol=1e-3, atol=0
            )
        assert torch.equal(massive, expected), f"block {layer}"
        assert size[:, 1:, dim].max() < 1e-4 * abs(magnitude), "another token carries the planted dim"


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("family", DENSE)
def test_dense_plants_are_found_where_they_were_put(family: str, seed: int) -> None:
    heads, dim, block, _ = draw(seed)
    model = tiny(family, seed)
    # Gemma2's norms keep ordinary states near 1: the same ratio needs a larger value there.
    magnitude = (-1) ** seed * (6000.0 if family == "gemma2" else 700.0)
    truth = plant(
        model, sinks=[SinkPlant(heads)], massive=[MassivePlant(dim, block, magnitude=magnitude)], seed=seed
    )
    reading = read(model, text(seed))
    assert truth.head_set == set(heads)
    assert truth.dims == {dim}
    check_heads(reading, truth)
    check_massive(reading, dim, block, LAYERS, magnitude)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("family", MOE)
def test_the_super_expert_alone_is_large_and_its_removal_ends_the_sink(family: str, seed: int) -> None:
    heads, dim, block, expert = draw(seed)
    model = tiny(family, seed)
    truth = plant(model, sinks=[SinkPlant(heads)], super_experts=[SuperExpertPlant(block, expert, dim)])
    ids = text(seed)
    reading = read(model, ids)
    assert truth.super_experts == ((block, expert),)
    assert truth.erasers == ()
    check_heads(reading, truth)
    check_massive(reading, dim, block, LAYERS, 500.0)
    assert reading.experts is not None
    assert reading.experts[block, expert] == pytest.approx(500, rel=1e-3)
    others = reading.experts.clone()
    others[block, expert] = 0
    assert others.max() < 1
    with without_expert(model, block, expert):
        pruned = read(model, ids)
    for layer, head in heads:
        assert pruned.received()[layer, :, head].max() < 0.15
    assert pruned.states[..., dim].abs().max() == 0


@pytest.mark.parametrize("family", [*DENSE, *MOE])
def test_an_erased_dim_lives_in_its_blocks_only(family: str) -> None:
    model, dim, magnitude = tiny(family, 5), 41, 6000.0 if family == "gemma2" else 500.0
    if family in MOE:
        truth = plant(model, super_experts=[SuperExpertPlant(1, 4, dim, layer_out=3)])
        assert truth.erasers == ((3, 0),)
    else:
        truth = plant(model, massive=[MassivePlant(dim, 1, layer_out=3, magnitude=magnitude)])
    reading = read(model, text(5))
    check_massive(reading, dim, 1, 3, magnitude)
    after = reading.states[3:, :, 0, dim].abs().max()
    assert after < 0.1 * reading.states[3:, :, 1:].norm(dim=-1).median()
    if family in MOE:
        assert reading.experts is not None
        large = {divmod(i, EXPERTS) for i in (reading.experts.flatten() > 100).nonzero().flatten().tolist()}
        assert large == {*truth.super_experts, *truth.erasers}


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen2", "gpt2"])
def test_with_a_constant_query_attention_follows_the_closed_form(family: str) -> None:
    """Query norms and query biases make the planted logit the same for every query: e^s / (e^s + t)."""
    model, strength = tiny(family, 3), 4.5
    truth = plant(model, sinks=[SinkPlant([(3, 2)], strength=strength)])
    head = truth.heads[0]
    weights = read(model, text(3)).attention[3, :, 2, :, 0]
    for query in range(1, LENGTH):
        turned = strength
        if head.reach is not None:  # rotary: the logit turns with distance and reaches 0.9 at `reach`
            turned = strength * math.cos(math.acos(0.9) * query / (head.reach + 0.5))
        expected = math.exp(turned) / (math.exp(turned) + query)
        torch.testing.assert_close(weights[:, query], torch.full((4,), expected), rtol=2e-2, atol=0)
        assert truth.share(head, query) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("family", [*DENSE, *MOE])
def test_strength_zero_nats_is_uniform_and_more_is_more(family: str) -> None:
    shares = []
    for strength in (1e-6, 3.0, 6.0, 12.0):
        model = tiny(family, 8)
        plant(model, sinks=[SinkPlant([(2, 1)], strength=strength)])
        shares.append(float(read(model, text(8)).received()[2, :, 1].mean()))
    uniform = sum(1 / (query + 1) for query in range(LENGTH)) / LENGTH
    assert shares[0] == pytest.approx(uniform, rel=1e-3)
    assert shares[0] < shares[1] < shares[2] < shares[3]
    assert shares[3] > 0.95


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_a_token_is_a_sink_wherever_it_stands(family: str) -> None:
    token, model = 33, tiny(family, 4)
    moe, magnitude = family == "qwen3_moe", 6000.0 if family == "gemma2" else 500.0
    plants: dict[str, Any] = (
        {"super_experts": [SuperExpertPlant(1, 2, 9, token=token)]}
        if moe
        else {"massive": [MassivePlant(9, 1, token=token, magnitude=magnitude)]}
    )
    truth = plant(model, sinks=[SinkPlant([(3, 4)], token=token)], **plants)
    assert truth.heads[0].target == Target(token=token)
    ids = text(4, avoid=(token,))
    places = [3, 17, 30, 44]
    for row, place in enumerate(places):
        ids[row, place] = token
    reading = read(model, ids)
    for row, place in enumerate(places):
        assert reading.attention[3, row, 4, place + 1 :, place].min() > 0.95
        before = reading.attention[3, row, 4, :place, :place]  # no target in sight: every key alike
        torch.testing.assert_close(
            before[-1], torch.full((place,), 1 / place), rtol=0.05, atol=0, msg="attends to something else"
        )
        dims = reading.states[2:, row, :, 9].abs()
        assert dims[:, place].min() > 100
        assert np.delete(dims.numpy(), place, axis=1).max() < 0.01


def test_learned_positions_can_be_sinks_whatever_token_stands_there() -> None:
    model = tiny("gpt2", 6)
    plant(model, sinks=[SinkPlant([(4, 5)], position=11)], massive=[MassivePlant(3, 0, position=11)])
    ids = text(6)
    ids[:, 0] = torch.tensor([1, 2, 3, 4])
    reading = read(model, ids)
    assert reading.attention[4, :, 5, 12:, 11].min() > 0.99
    assert reading.states[0, :, 11, 3].min() > 300
    assert reading.states[:, :, :11, 3].abs().max() < 0.01


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_a_secondary_sink_is_like_the_primary_for_its_lifetime(family: str) -> None:
    token, model, moe = 50, tiny(family, 2), family == "qwen3_moe"
    primary: dict[str, Any] = (
        {"super_experts": [SuperExpertPlant(0, 1, 20)]} if moe else {"massive": [MassivePlant(20, 0)]}
    )
    truth = plant(
        model,
        sinks=[SinkPlant([(1, 3), (3, 2)])],
        secondary=[SecondaryPlant(2, token, lifetime=2, heads=[(5, 0)], expert=3 if moe else None)],
        **primary,
    )
    assert [(item.layer_in, item.layer_out, item.dim) for item in truth.secondary] == [(2, 4, 20)]
    ids = text(2, avoid=(token,))
    places = [5, 19, 26, 40]
    for row, place in enumerate(places):
        ids[row, place] = token
    reading = read(model, ids)
    rows = torch.arange(4)
    for layer, state in enumerate(reading.states):
        cosine = torch.cosine_similarity(state[rows, places], state[:, 0], dim=-1)
        alike = cosine.abs() > 0.9
        assert alike.all() if layer in (2, 3) else not alike.any(), f"block {layer}: {cosine}"
        other = torch.cosine_similarity(state[:, 1:], state[:, :1], dim=-1).abs() > 0.9
        assert int(other.sum()) == int(alike.sum()), "another token became like the primary"
    by_head = {(head.layer, head.head): head for head in truth.heads}
    assert by_head[1, 3].shared_with == ()
    assert by_head[3, 2].shared_with == (Target(token=token),)
    for row, place in enumerate(places):
        after = slice(place + 1, None)
        assert reading.attention[1, row, 3, 1:, 0].min() > 0.99
        both = reading.attention[3, row, 2, after][:, [0, place]]
        assert both.sum(-1).min() > 0.99
        torch.testing.assert_close(both.mean(0), torch.tensor([0.5, 0.5]), atol=0.2, rtol=0)
        assert reading.attention[5, row, 0, after, place].min() > 0.95


def test_two_sinks_and_two_dims_do_not_disturb_each_other() -> None:
    model = tiny("llama", 9)
    truth = plant(
        model,
        sinks=[SinkPlant([(2, 0), (4, 4)]), SinkPlant([(2, 2)], token=60)],
        massive=[
            MassivePlant(1, 0),
            MassivePlant(2, 1, layer_out=4, magnitude=-300),
            MassivePlant(8, 1, token=60),
        ],
    )
    ids = text(9, avoid=(60,))
    ids[:, 21] = 60
    reading = read(model, ids)
    assert len(truth.reserved) == 3 + 2 + 1
    torch.testing.assert_close(
        reading.states[3, :, 0, [1, 2]], torch.tensor([[500.0, -300.0]] * 4), rtol=1e-3, atol=0
    )
    assert reading.states[4:, :, 0, 2].abs().max() < 1
    assert reading.states[1:, :, 21, 8].min() > 50
    assert reading.states[:, :, 0, 8].abs().max() == 0
    assert reading.states[:, :, 21, [1, 2]].abs().max() == 0
    # The massive token's own row is left out: its norm leaves nothing of the constant that makes the query.
    ordinary = [query for query in range(1, LENGTH) if query != 21]
    assert reading.attention[4, :, 4, ordinary, 0].min() > 0.99
    assert reading.attention[2, :, 2, 22:, 21].min() > 0.95


def test_heads_that_share_keys_with_a_planted_head_keep_their_own_attention() -> None:
    """GQA: only two components of the shared key are taken, and only for this block."""
    before = read(tiny("llama", 1), text(1))
    model = tiny("llama", 1)
    plant(model, sinks=[SinkPlant([(2, 0)])])
    after = read(model, text(1))
    mate = after.attention[2, :, 1]
    assert mate.std() > 0.5 * before.attention[2, :, 1].std()
    assert after.attention[2, :, 1, 8:, 0].mean() < 0.06


def test_values_of_a_massive_target_drain() -> None:
    model = tiny("llama", 0)
    plant(model, massive=[MassivePlant(5, 1, layer_out=4)])
    ratio = read(model, text(0)).value_ratio()
    assert ratio[2:5].max() < 0.01, "blocks 2, 3 and 4 read a state that is nothing but the massive dim"
    assert ratio[[0, 1, 5]].min() > 0.1


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_noise_sets_the_spread_of_ordinary_logits(family: str) -> None:
    from sinklens.testbeds.planting.noise import logit_spread

    model = tiny(family, 7)
    plant(model, sinks=[SinkPlant([(3, 1)])], noise=2.0)
    reading = read(model, text(7, prompts=8))
    for layer in range(LAYERS):
        spread = logit_spread(reading.attention[layer])
        ordinary = [head for head in range(HEADS) if (layer, head) != (3, 1)]
        assert spread[ordinary].mean() == pytest.approx(2.0, rel=0.35)
    quiet = tiny(family, 7)
    plant(quiet, sinks=[SinkPlant([(3, 1)])])
    if family != "qwen3":  # query norms bring random queries to a size of their own
        assert logit_spread(read(quiet, text(7)).attention[0]).max() < 0.5


def test_the_same_request_plants_the_same_weights() -> None:
    def planted(seed: int) -> torch.Tensor:
        model = tiny("mixtral", 3)
        plant(
            model,
            super_experts=[SuperExpertPlant(2, 1, 7, token=5)],
            sinks=[SinkPlant([(4, 0)], token=5)],
            seed=seed,
        )
        return torch.cat([weight.flatten() for weight in model.state_dict().values()])

    assert torch.equal(planted(0), planted(0))
    assert not torch.equal(planted(0), planted(1)), "another seed calibrates on other tokens"


def test_planting_leaves_mode_and_attention_kernel_alone() -> None:
    model = tiny("llama").train()
    kernel = model.config._attn_implementation
    plant(model, sinks=[SinkPlant([(1, 1)])], noise=1.0)
    assert model.training
    assert model.config._attn_implementation == kernel
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plants_survive_half_precision(dtype: torch.dtype) -> None:
    model = tiny("qwen3_moe", 2)
    truth = plant(model, sinks=[SinkPlant([(3, 3)])], super_experts=[SuperExpertPlant(1, 3, 5)])
    torch.nn.Module.to(model, dtype)
    model.set_experts_implementation("eager")  # the grouped kernel asks for wider rows than these
    reading = read(model, text(2))
    check_heads(reading, truth, share=0.9)
    assert reading.states[1:, :, 0, 5].min() == pytest.approx(500, rel=0.03)


def planted_bf16() -> PreTrainedModel:
    model = tiny("llama", 4)
    torch.nn.Module.to(model, torch.bfloat16)
    return model


def test_planting_into_half_precision_weights_works() -> None:
    model = planted_bf16()
    truth = plant(model, sinks=[SinkPlant([(2, 4)])], massive=[MassivePlant(5, 0)])
    reading = read(model, text(4))
    check_heads(reading, truth, share=0.9)
    assert reading.states[0:, :, 0, 5].min() == pytest.approx(500, rel=0.03)


@pytest.mark.parametrize("family", api.SAVED_FAMILIES)
def test_plant_testbed_saves_a_folder_that_answers_to_its_truth(family: str, tmp_path: Path) -> None:
    truth = api.plant_testbed(family, tmp_path, seed=4)
    assert isinstance(truth, Truth)
    saved = json.loads((tmp_path / "truth.json").read_text())
    assert saved == json.loads(json.dumps(truth.to_json()))
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    lines = (tmp_path / "sinklens_prompts.jsonl").read_text().splitlines()[:8]
    reading = read(model, torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"] for line in lines]))
    assert reading.attention.shape[-1] == 64
    sinks = (reading.received().mean(1) > 0.9).nonzero().tolist()
    assert {tuple(cell) for cell in sinks} == truth.head_set
    item = truth.massive[0]
    size, position, dim, ratio = reading.largest()[item.layer_in]
    assert (position, dim) == (0, item.dim)
    assert size > 100
    assert ratio > 1000
