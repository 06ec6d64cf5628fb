"""Heads that rest wholly on the first token: every analyzer runs, and the self-check holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

import sinklens
from sinklens.analyzers import Status
from sinklens.testbeds import MassivePlant, SinkPlant, plant, random_control

CONFIG: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
HEADS = [(3, 0), (5, 3), (8, 2)]


@pytest.mark.parametrize("strength", [None, 25.0])
def test_a_planted_sink_that_takes_everything_is_profiled_with_all_analyzers(strength: float | None) -> None:
    """40 nats is the default; what such a row leaves beside the sink, 1e-15, says nothing about other tokens."""
    planted = SinkPlant(heads=HEADS) if strength is None else SinkPlant(heads=HEADS, strength=strength)
    model = random_control(LlamaConfig(**CONFIG), 0)
    plant(model, sinks=[planted], massive=[MassivePlant(dim=7, layer_in=2, layer_out=10)])
    generator = np.random.default_rng(0)
    prompts = [[1, *generator.integers(3, 97, length - 1).tolist()] for length in (70, 97, 133, 41)]
    run = sinklens.profile(model, prompts=prompts, analyzers="all", verify=False)
    assert run.findings["primary-sinks"].status is Status.FOUND
    assert run.findings["fai"].status is not Status.NOT_APPLICABLE
    for record in run.trace:
        influence = record.arrays["future_influence"]
        known = ~np.isnan(influence)
        # The other heads still tell how later tokens look at all but the first: no key is lost, nothing exceeds 1.
        assert known[:, 1:-10].all()
        assert not known[:, -10:].any()
        assert (influence[known] <= 1).all()
