"""Planted writers, erasers and secondary sinks: the trace names exactly the block, sublayer, expert and neuron."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sinklens.models.anatomy import find_anatomy
from sinklens.models.spec import ModelInfo, OpenedModel
from sinklens.testbeds.planting.plant import plant
from sinklens.testbeds.planting.truth import (
    MassivePlant,
    PlantedMassive,
    SecondaryPlant,
    SuperExpertPlant,
    Truth,
)
from sinklens.tracers import signals as sig
from sinklens.tracers.batch import Batch
from sinklens.tracers.executor import TracePlan, trace_batch
from sinklens.tracers.trace import PromptRecord
from tests.testbeds.families import BOS, DENSE, EXPERTS, MOE, VOCABULARY, tiny

from .test_state_signals import STATES

TOKEN, PLACES, LENGTH = 33, (20, 41), 53
WITH_ATTENTION = STATES | {sig.REFERENCE_POSITION, sig.ATTENTION_RECEIVED}


def planted(family: str, seed: int) -> tuple[Any, Truth]:
    """A massive dim of BOS in block 0 or 1, a secondary sink two blocks later, both erased before the end."""
    rng = np.random.default_rng(seed)
    model, block, dim, expert = (
        tiny(family, seed),
        seed % 2,
        int(rng.integers(60)),
        int(rng.integers(EXPERTS)),
    )
    magnitude = 6000.0 if family == "gemma2" else 700.0
    if family in MOE:
        other = (expert + 2) % EXPERTS
        truth = plant(
            model,
            super_experts=[SuperExpertPlant(block, expert, dim, layer_out=5, magnitude=magnitude)],
            secondary=[SecondaryPlant(block + 2, token=TOKEN, lifetime=2, expert=other)],
            seed=seed,
        )
    else:
        truth = plant(
            model,
            massive=[MassivePlant(dim, block, layer_out=5, magnitude=magnitude)],
            secondary=[SecondaryPlant(block + 2, token=TOKEN, lifetime=2)],
            seed=seed,
        )
    return model, truth


def traced(model: Any, seed: int, signals: frozenset[sig.Signal] = STATES) -> list[PromptRecord]:
    """Two prompts with BOS first and the other target twice; the second is padded on the left."""
    free = [token for token in range(VOCABULARY) if token not in (BOS, TOKEN)]
    ids = torch.tensor(np.random.default_rng(seed).choice(free, size=(2, LENGTH)))
    ids[:, list(PLACES)] = TOKEN
    ids[0, 0] = ids[1, 5] = BOS
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :5] = False
    opened = OpenedModel(model, None, find_anatomy(model), ModelInfo("", None, "", 6, 6, 3, 60, 0, ""))
    inputs = {
        "input_ids": ids,
        "attention_mask": valid.long(),
        "position_ids": (valid.long().cumsum(-1) - 1).clamp(0),
    }
    return trace_batch(opened, Batch(inputs, valid), TracePlan(signals=signals)).records


def entry(record: PromptRecord, layer: int, pos: int, dim: int) -> int:
    """The first traced entry at this place."""
    at = (record["residual_after_pos"][layer] == pos) & (record["residual_after_dim"][layer] == dim)
    assert at.any(), (layer, pos, dim)
    return int(np.argmax(at))


def check_item(record: PromptRecord, truth: Truth, item: PlantedMassive, positions: list[int]) -> None:
    for pos in positions:
        for layer in range(6):
            if layer < item.layer_in or layer > item.layer_out:
                continue
            i = entry(record, layer, pos, item.dim)
            attention, mlp = record["attention_write"][layer, i], record["mlp_write"][layer, i]
            assert abs(attention) < 1e-3 * item.magnitude
            expert, neuron = record["write_expert"][layer, i], record["write_neuron"][layer, i]
            if item.layer_in < layer < item.layer_out:
                assert abs(mlp) < 1e-3 * item.magnitude
                assert expert == neuron == -1
                continue
            begins = layer == item.layer_in
            # Inside a text magnitudes vary with the context, by a factor of 2 or so.
            size = mlp / item.magnitude if begins else -mlp / item.magnitude
            assert abs(size - 1) < 0.01 if pos == 0 else 0.4 < size < 2.5
            planted_expert = item.expert if begins else item.eraser
            assert expert == (-1 if planted_expert is None else planted_expert)
            assert neuron in ((item.neuron,) if begins else item.eraser_neurons)
            if expert >= 0:
                assert record["write_expert_value"][layer, i] == pytest.approx(mlp, rel=1e-3)
            elif begins and truth.family != "gemma2":  # a norm stands between neuron and stream
                assert record["write_neuron_value"][layer, i] == pytest.approx(mlp, rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", [*DENSE, *MOE])
def test_the_planted_writers_are_named(family: str, seed: int) -> None:
    model, truth = planted(family, seed)
    primary, secondary = truth.massive
    for record, shift in zip(traced(model, seed), (0, 5), strict=True):
        check_item(record, truth, primary, [0])
        check_item(record, truth, secondary, [place - shift for place in PLACES])
        if family in MOE:
            assert primary.expert is not None
            layer = primary.layer_in
            assert record["expert_neuron"][layer, primary.expert] == primary.neuron
            assert record["router_score"][layer, 0, primary.expert] > 0.99


@pytest.mark.parametrize("signals", [STATES, WITH_ATTENTION], ids=["leader by norm", "leader by attention"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", [*DENSE, *MOE])
def test_births_are_the_planted_ones(family: str, seed: int, signals: frozenset[sig.Signal]) -> None:
    model, truth = planted(family, seed)
    secondary = truth.massive[1]
    for record, shift in zip(traced(model, seed, signals), (0, 5), strict=True):
        count = int((record["birth_layer"] >= 0).sum())
        # The block that erases GPT-2's plant also moves ordinary tokens, and those may line up.
        early = int((record["birth_layer"][:count] < truth.massive[0].layer_out).sum())
        births = sorted(
            zip(*(record[name][:early].tolist() for name in ("birth_layer", "birth_position")), strict=True)
        )
        assert births == [(secondary.layer_in, place - shift) for place in PLACES]
        assert record["birth_reference"][:early].tolist() == [0] * early
        assert (record["birth_position"][count:] == -1).all()
        assert np.isnan(record["birth_cosine"][count:]).all()
        norms = record["birth_write_norm"][:early]
        assert ((norms > 0.4 * secondary.magnitude) & (norms < 2.5 * secondary.magnitude)).all()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_what_the_feed_forward_part_saw(family: str) -> None:
    """The parts' cosines from the weights: the first token and a token born later, both in the block of the birth."""
    model, truth = planted(family, 1)
    secondary = truth.massive[1]
    layer = (model.transformer.h if family == "gpt2" else model.model.layers)[secondary.layer_in]
    read: list[torch.Tensor] = []
    handle = layer.mlp.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    record = traced(model, 1)[0]
    handle.remove()
    for birth in range(2):
        rows = read[-1][0, [int(record["birth_position"][birth]), int(record["birth_reference"][birth])]]
        if family == "llama":
            gate, up = layer.mlp.gate_proj(rows), layer.mlp.up_proj(rows)
            product = layer.mlp.act_fn(gate) * up
            parts: list[Any] = [rows, gate, up, layer.mlp.act_fn(gate), product, layer.mlp.down_proj(product)]
        elif family == "gpt2":
            up = layer.mlp.c_fc(rows)
            parts = [rows, None, up, None, layer.mlp.act(up), layer.mlp(rows)]
        else:  # the inside of the planted expert, if the reference is routed to it as well
            expert = secondary.expert
            assert expert is not None
            chosen = record["router_choice"][secondary.layer_in, int(record["birth_reference"][birth])]
            inside: list[Any] = [None] * 4
            if expert in chosen:
                gate, up = (rows @ layer.mlp.experts.gate_up_proj[expert].T).chunk(2, -1)
                act = layer.mlp.experts.act_fn(gate)
                inside = [gate, up, act, act * up]
            parts = [rows, *inside, layer.mlp(rows[None])[0]]
        for part, value in enumerate(parts):
            found = record["birth_cosine"][birth, part]
            if value is None:
                assert np.isnan(found)
            else:
                assert found == pytest.approx(
                    float(torch.cosine_similarity(value[0], value[1], dim=0)), abs=1e-4
                )


def test_only_what_a_block_brings_about_is_a_birth() -> None:
    """Tokens that are alike from the embedding on are not born, and a position is born once."""
    model, truth = planted("llama", 0)
    with torch.no_grad():  # the marked token is large and like BOS from the start
        table = model.model.embed_tokens.weight
        table[BOS] *= 300
        table[TOKEN] = 0.9 * table[BOS]
    record = traced(model, 0)[0]
    assert (record["birth_layer"] == -1).all()
    assert record["residual_cosine"][0, 0, PLACES[0]] > 0.9
    assert truth.massive[1].secondary
