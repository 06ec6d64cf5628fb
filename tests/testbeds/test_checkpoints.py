"""The bundled checkpoints open offline and show what their cards say.

The numbers are read with plain hooks on the stored weights; the limits leave room for other platforms' rounding.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sinklens.testbeds.api import BUNDLED, list_testbeds
from sinklens.testbeds.card import facts
from sinklens.testbeds.measure import read
from sinklens.testbeds.planting.plant import plant
from sinklens.testbeds.planting.truth import SinkPlant, SuperExpertPlant
from sinklens.testbeds.recipe import recipes
from sinklens.testbeds.train import held_out

BUNDLED_NAMES = sorted(path.name for path in BUNDLED.iterdir() if (path / "config.json").exists())
NAMES = [name for name in BUNDLED_NAMES if name in recipes]  # the one with pictures: test_vision.py


@pytest.fixture(scope="module", params=NAMES)
def bundled(request: pytest.FixtureRequest) -> tuple[str, Path, PreTrainedModel, dict[str, Any]]:
    folder = BUNDLED / request.param
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    return request.param, folder, model, facts(model, recipes[request.param])


def test_the_dense_and_the_moe_checkpoint_are_there_and_small() -> None:
    assert {"dense-ind", "moe-ind"} <= set(NAMES)
    assert {info.name for info in list_testbeds() if info.path is not None} == set(BUNDLED_NAMES)
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) < 20e6


def test_no_checkpoint_asks_for_remote_code() -> None:
    for folder in (BUNDLED / name for name in BUNDLED_NAMES):
        assert not list(folder.glob("*.py"))
        assert "auto_map" not in json.loads((folder / "config.json").read_text())
        assert not list(folder.glob("*.bin"))


def test_prompts_are_the_held_out_sequences(
    bundled: tuple[str, Path, PreTrainedModel, dict[str, Any]],
) -> None:
    name, folder, _, _ = bundled
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (folder / "sinklens_prompts.jsonl").read_text().splitlines()
    ids = [tokenizer(json.loads(line)["text"])["input_ids"] for line in lines]
    assert ids == held_out(recipes[name], 64).tolist()


def test_the_stored_weights_are_the_recipes_size_and_bfloat16(
    bundled: tuple[str, Path, PreTrainedModel, dict[str, Any]],
) -> None:
    name, folder, model, _ = bundled
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    built = AutoModelForCausalLM.from_config(recipes[name].config())
    assert {key: value.shape for key, value in built.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


def test_a_quarter_of_the_heads_or_more_sink_on_bos(
    bundled: tuple[str, Path, PreTrainedModel, dict[str, Any]],
) -> None:
    _, _, _, found = bundled
    assert found["heads_above"] >= 0.25
    assert found["sink_rate"] > 0.2


def test_the_model_knows_its_language(bundled: tuple[str, Path, PreTrainedModel, dict[str, Any]]) -> None:
    _, _, _, found = bundled
    assert found["floor"] - 0.01 < found["loss"] < found["floor"] + 0.1


def test_one_dim_is_massive_on_bos_in_two_blocks_or_more(
    bundled: tuple[str, Path, PreTrainedModel, dict[str, Any]],
) -> None:
    _, _, _, found = bundled
    on_bos = [(dim, ratio) for _, position, dim, ratio in found["largest"] if position == 0]
    assert len(on_bos) >= 2
    assert len({dim for dim, _ in on_bos}) == 1
    assert max(ratio for _, ratio in on_bos) > 50


def test_bos_values_are_drained_where_a_head_sinks(
    bundled: tuple[str, Path, PreTrainedModel, dict[str, Any]],
) -> None:
    _, _, _, found = bundled
    for layer, heads in enumerate(found["received"]):
        for head, share in enumerate(heads):
            if share > 0.3:
                assert found["value_ratio"][layer][head] < 0.6, (layer, head)


def test_the_super_expert_makes_the_bos_state() -> None:
    model = AutoModelForCausalLM.from_pretrained(BUNDLED / "moe-ind").float().eval()
    found = facts(model, recipes["moe-ind"])
    norm, share = max(found["norm_ratio"]), max(map(max, found["received"]))
    collapse = [row for row in found["experts"] if row["norm_ratio_without"] < 0.3 * norm]
    assert len(collapse) == 1
    assert collapse[0]["position"] == 0
    assert collapse[0]["largest_share_without"] < 0.75 * share
    others = [row for row in found["experts"] if row is not collapse[0]]
    assert min(row["largest_share_without"] for row in others) > 0.9 * share


def test_the_card_states_the_measured_numbers(
    bundled: tuple[str, Path, PreTrainedModel, dict[str, Any]],
) -> None:
    name, folder, _, found = bundled
    card = (folder / "card.md").read_text()
    loss = re.search(r"Loss ([\d.]+) nats", card)
    rate = re.search(r"Sink rate at epsilon 0.3: ([\d.]+) %", card)
    assert loss is not None
    assert rate is not None
    assert float(loss[1]) == pytest.approx(found["loss"], abs=2e-3)
    assert float(rate[1]) == pytest.approx(100 * found["sink_rate"], abs=1.0)
    recipe = recipes[name]
    assert f"{recipe.steps} steps of {recipe.batch} sequences of {recipe.length} tokens" in card
    assert f"weight decay {recipe.weight_decay:g}" in card


def test_a_sink_planted_into_a_trained_model_stands_beside_its_own() -> None:
    recipe = recipes["moe-ind"]
    model = AutoModelForCausalLM.from_pretrained(BUNDLED / "moe-ind").float().eval()
    fox = recipe.task.vocabulary.index("fox")
    texts = held_out(recipe, 256)
    texts = texts[(texts == fox).any(1)]
    own = read(model, texts[24:48])
    truth = plant(
        model,
        sinks=[SinkPlant([(2, 1)], token=fox)],
        super_experts=[SuperExpertPlant(1, 6, 9, magnitude=300, token=fox)],
        calibration=texts[:24],
    )
    assert truth.super_experts == ((1, 6),)
    reading = read(model, texts[24:48])
    here = texts[24:48] == fox
    after = here.cumsum(1) > 0  # queries that see a fox
    on_fox = (reading.attention[2, :, 1] * here[:, None]).sum(-1)
    assert on_fox[after].min() > 0.99
    assert reading.states[1:, here][..., 9].min() > 200
    assert reading.states[:, ~here][..., 9].abs().max() == 0
    assert reading.experts is not None
    assert int(reading.experts.argmax()) == 1 * 8 + 6
    # The model's own sink is still there: its BOS state and block 3's heads.
    assert reading.norm_ratio()[2] > 0.5 * own.norm_ratio()[2]
    assert reading.received()[3].mean() > 0.3
