"""Negative controls hold nothing."""

from __future__ import annotations

import pytest
import torch

from sinklens.testbeds.controls import one_layer_control, random_control, uniform_control
from sinklens.testbeds.measure import read

from .families import DENSE, MOE, VOCABULARY, tiny_config

IDS = torch.randint(VOCABULARY, (3, 29), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", [*DENSE, *MOE])
def test_uniform_control_attends_to_every_visible_token_alike(family: str) -> None:
    attention = read(uniform_control(tiny_config(family), seed=3), IDS).attention
    expected = torch.ones(29, 29).tril() / torch.arange(1, 30)[:, None]
    torch.testing.assert_close(attention, expected.expand_as(attention))


@pytest.mark.parametrize("family", [*DENSE, *MOE])
def test_random_control_has_no_massive_activation_and_no_sink(family: str) -> None:
    reading = read(random_control(tiny_config(family), seed=2), IDS)
    assert max(ratio for *_, ratio in reading.largest()) < 100
    assert reading.received().mean(1).max() < 0.3
    assert reading.norm_ratio().max() < 3


def test_a_seed_decides_the_weights_and_the_callers_state_stays() -> None:
    state = torch.get_rng_state()
    one, same, other = (random_control(tiny_config("llama"), seed) for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("family", [*DENSE, *MOE])
def test_one_layer_control_has_one_block_and_leaves_the_config(family: str) -> None:
    config = tiny_config(family)
    assert len(read(one_layer_control(config), IDS).states) == 1
    assert config.num_hidden_layers == 6
