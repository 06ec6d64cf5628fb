"""Bad requests are refused in a sentence, and the model is untouched afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from sinklens.core.errors import ModelError, UsageError
from sinklens.testbeds import api
from sinklens.testbeds.controls import random_control
from sinklens.testbeds.planting.plant import plant
from sinklens.testbeds.planting.truth import MassivePlant, SecondaryPlant, SinkPlant, SuperExpertPlant

from .families import tiny

SINK = SinkPlant([(1, 1)])
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {}, "Nothing to plant"),
    ("llama", {"sinks": [SinkPlant([(6, 0)])]}, "There is no layer 6.\nThere are 6 of them: 0 to 5."),
    ("llama", {"sinks": [SinkPlant([(-1, 0)])]}, "There is no layer -1."),
    ("llama", {"sinks": [SinkPlant([(2, 6)])]}, "There is no query head 6 in block 2."),
    ("llama", {"sinks": [SinkPlant([])]}, "names no heads"),
    ("llama", {"sinks": [SinkPlant([(2, 1)], token=101)]}, "There is no token 101."),
    ("llama", {"sinks": [SinkPlant([(2, 1)], token=3, position=4)]}, "give one of the two"),
    ("llama", {"sinks": [SinkPlant([(2, 1)], position=0)]}, "Its positions are rotary"),
    ("gpt2", {"sinks": [SinkPlant([(2, 1)], position=96)]}, "There is no position 96."),
    ("llama", {"sinks": [SinkPlant([(2, 1)], strength=0.0)]}, "A sink of strength 0.0 is none"),
    ("llama", {"sinks": [SinkPlant([(2, 1)], strength=float("nan"))]}, "A sink of strength nan is none"),
    ("gemma2", {"sinks": [SinkPlant([(2, 1)], strength=50.0)]}, "caps its logits at 50"),
    ("llama", {"sinks": [SINK, SINK]}, "head 1 of block 1 is named twice"),
    ("llama", {"sinks": [SINK, SinkPlant([(1, 0)], token=9)]}, "read the same key head"),
    ("llama", {"massive": [MassivePlant(60, 1)]}, "There is no dim 60."),
    ("llama", {"massive": [MassivePlant(6, 6)]}, "There is no layer 6."),
    ("llama", {"massive": [MassivePlant(6, 3, layer_out=3)]}, "it is not after it"),
    ("llama", {"massive": [MassivePlant(6, 3, magnitude=0)]}, "give a magnitude such as 500"),
    (
        "llama",
        {"massive": [MassivePlant(6, 1), MassivePlant(6, 3)]},
        "dim 6 of token 7 is written by block 1",
    ),
    (
        "llama",
        {"massive": [MassivePlant(6, 1), MassivePlant(6, 3, token=9)]},
        "dim 6 is for token 7 and for token 9",
    ),
    ("llama", {"super_experts": [SuperExpertPlant(1, 0, 6)]}, "Block 1 has no experts"),
    ("qwen3_moe", {"massive": [MassivePlant(6, 1)]}, "which expert shall write dim 6?"),
    ("qwen3_moe", {"super_experts": [SuperExpertPlant(1, 5, 6)]}, "There is no expert 5 in block 1."),
    (
        "qwen3_moe",
        {"super_experts": [SuperExpertPlant(1, 2, 6), SuperExpertPlant(1, 3, 8)]},
        "block 1 would send token 7 to expert 2 and to expert 3",
    ),
    ("llama", {"secondary": [SecondaryPlant(3, 9)]}, "No primary sink lives at block 3"),
    (
        "llama",
        {"massive": [MassivePlant(6, 3)], "secondary": [SecondaryPlant(3, 9)]},
        "No primary sink lives",
    ),
    (
        "llama",
        {"massive": [MassivePlant(6, 1, layer_out=4)], "secondary": [SecondaryPlant(2, 9, lifetime=3)]},
        "Give a lifetime of at most 2.",
    ),
    ("llama", {"massive": [MassivePlant(6, 1)], "secondary": [SecondaryPlant(2, 9, lifetime=0)]}, "is none"),
    (
        "qwen3_moe",
        {"super_experts": [SuperExpertPlant(0, 1, 6)], "secondary": [SecondaryPlant(2, 9)]},
        "expert=...",
    ),
    ("llama", {"sinks": [SINK], "noise": -1.0}, "A noise of -1.0 nats"),
    ("llama", {"sinks": [SINK], "calibration": torch.full((2, 9), 3)}, "do not hold token 7"),
    (
        "llama",
        {"massive": [MassivePlant(dim, 0, token=20 + dim) for dim in range(14)]},
        "14 targets are too many",
    ),
]


@pytest.mark.parametrize(("family", "request_", "sentence"), BAD)
def test_a_bad_request_is_refused_and_changes_nothing(
    family: str, request_: dict[str, Any], sentence: str
) -> None:
    model = tiny(family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(UsageError) as caught:
        plant(model, **request_)
    assert sentence in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 4
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_an_unknown_family_is_a_model_error() -> None:
    model = random_control(AutoConfig.for_model("opt", vocab_size=61, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32))  # fmt: skip
    with pytest.raises(ModelError, match="Planting does not know the family 'opt'"):
        plant(model, sinks=[SINK])


def test_a_config_without_bos_asks_for_the_token() -> None:
    model = tiny("llama", bos_token_id=None)
    with pytest.raises(UsageError, match="Say which token"):
        plant(model, sinks=[SINK])
    assert plant(model, sinks=[SinkPlant([(1, 1)], token=7)]).heads[0].target.token == 7


def test_plant_testbed_names_the_families(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match="Did you mean 'llama'"):
        api.plant_testbed("lama", tmp_path)
