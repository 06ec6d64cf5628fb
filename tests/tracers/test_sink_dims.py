"""Sink dims: their value, the threshold, the published ones, and the search."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sinklens.core.errors import UsageError
from sinklens.inputs import load_prompts
from sinklens.kernels.magnitudes import lower_medians
from sinklens.models.opening import open_model
from sinklens.tracers.calibrate_dims import dims_of, search_sink_dims
from sinklens.tracers.discover_dims import (
    attending_layers,
    discover,
    middle_layers,
    reference_token,
)
from sinklens.tracers.sink_dims import (
    TAU_ENERGY,
    SinkDims,
    cut_for,
    known,
    phi,
    published,
    ratios,
    sinks,
    table,
)
from sinklens.tracers.trace import PromptRecord


def golden() -> torch.Tensor:
    x = torch.full((16,), 0.1)
    x[5], x[11] = -8.0, 4.0
    return x


def test_phi_of_a_known_state():
    x = golden()
    assert float((x.double().square().mean() + 1e-6).sqrt()) == pytest.approx(2.238024, abs=1e-6)
    assert float(phi(x, (5, 11))) == pytest.approx(3.574582, abs=1e-5)
    assert float(phi(x, (11,))) == pytest.approx(1.787291, abs=1e-5)
    assert float(ratios(x)[5]) == float(phi(x, (5,)))
    assert float(ratios(torch.eye(16)).max()) <= 4.0


def test_phi_is_computed_in_float32_and_keeps_its_axes():
    x = torch.stack([golden(), -golden()]).to(torch.bfloat16)[None]
    assert phi(x, (5, 11)).shape == (1, 2)
    assert phi(x, (5, 11)).dtype == torch.float32
    assert torch.equal(phi(x, (5, 11))[0, 0], phi(x, (5, 11))[0, 1]), "the sign does not matter"
    with pytest.raises(UsageError, match="at least one"):
        phi(x, ())
    assert not sinks(x, (), cut_for(16)).any()


def test_the_threshold_of_the_paper_and_of_the_code():
    cut = cut_for(4096)
    assert (cut.tau, cut.energy, cut.note) == (20.0, TAU_ENERGY, None)
    assert cut.reached(np.array([19.9, 20.0, 20.1])).tolist() == [False, True, True]
    strict = cut_for(4096, strict=True)
    assert strict.reached(torch.tensor([19.9, 20.0, 20.1])).tolist() == [False, False, True]
    assert cut_for(896).energy == pytest.approx(0.4464, abs=1e-4)
    assert cut_for(896, tau_energy=TAU_ENERGY).tau == pytest.approx(math.sqrt(TAU_ENERGY * 896))


def test_a_threshold_that_cannot_be_reached_says_so():
    assert cut_for(400).note is None
    cut = cut_for(399)
    assert cut.note is not None
    assert "cannot be reached with 399 dims" in cut.note
    assert cut.energy == TAU_ENERGY
    assert cut.tau == pytest.approx((TAU_ENERGY * 399) ** 0.5)
    for tau, share in ((0.0, None), (20.0, 1.5), (20.0, 0.0)):
        with pytest.raises(UsageError, match="threshold"):
            cut_for(64, tau, share)


def test_published_dims_have_source_and_status():
    assert len({entry.model for entry in table()}) == len(table())
    assert all(entry.source and entry.status in ("paper", "third party") for entry in table())
    assert all(e.hidden_size is None or max(e.dims) < e.hidden_size for e in table())
    dims = known("LLAVA-hf/llava-1.5-7b-hf@main", 4096)
    assert dims.indices == (1415, 2533)
    assert (dims.provenance, dims.status) == ("published", "paper")
    assert "2503.03321" in dims.source
    assert SinkDims.from_json(dims.to_json()) == dims


def test_third_party_dims_are_never_taken_silently():
    name = "Qwen/Qwen2.5-VL-3B-Instruct"
    with pytest.raises(UsageError, match="third party"):
        known(name, 2048)
    dims = known(name, 2048, third_party=True)
    assert dims.status == "third party"
    assert dims.also == ((1874, 1819),)
    assert SinkDims.from_json(dims.to_json()) == dims


def test_dims_of_another_model_are_refused():
    with pytest.raises(UsageError, match="belong to 4096 dims; this model has 64"):
        known("LLaVA-1.5-7B", 64)
    with pytest.raises(UsageError, match="No published sink dims"):
        known("example/none", 64)
    assert published("example/none") is None
    with pytest.raises(UsageError, match="no dim 64"):
        SinkDims.given((3, 64), 64)
    assert SinkDims.given((3, 5, 3), 64).indices == (3, 5)


def samples(size: int = 256, count: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Strengths and baselines of a model without sink dims."""
    rng = np.random.default_rng(3)
    return abs(rng.standard_normal((count, size))) * 0.7, np.full((count, size), 0.6)


def test_dims_that_only_the_reference_token_has_are_found():
    strengths, baselines = samples()
    strengths[:, 17], strengths[:, 99] = 11.0, 7.5
    found = discover(strengths, baselines, "a test")
    assert found.indices == (17, 99)
    assert found.failed is None
    first, second = found.dims
    assert first.margin == pytest.approx(11 / 7.5, rel=1e-5)
    assert (first.strength, first.baseline) == (11.0, pytest.approx(0.6))
    assert second.margin is not None
    assert second.margin > 3


def test_dims_that_every_token_has_are_not_sink_dims():
    strengths, baselines = samples()
    strengths[:, 17] = baselines[:, 17] = 12.0
    strengths[:, 99], baselines[:, 99] = 7.5, 0.1
    assert discover(strengths, baselines, "a test").indices == (99,)
    strengths[:, 99], baselines[:, 99] = 7.5, 0.9
    failed = discover(strengths, baselines, "a test")
    assert not failed
    assert failed.failed is not None
    assert "large for the other tokens too" in failed.failed


def test_a_bundled_model_that_grew_a_sink_shows_its_dim() -> None:
    """The massive dim that its card names; the model was not made for this search."""
    model = open_model("bundled:dense-ind")
    prompts = load_prompts(model.default_prompts, model.tokenizer, n=8, seq_len=64).prompts
    found = search_sink_dims(model, prompts)
    assert found.indices == (25,)
    assert (found.source, found.status) == ("8 text prompts", "measured")
    assert found.dims[0].strength is not None
    assert found.dims[0].strength > 7, "of at most 8"


def test_what_cannot_be_seen_is_not_searched() -> None:
    record = PromptRecord(0, np.arange(3), ("a", "b", "c"), "made", "", {})
    found = dims_of([record], 64)
    assert not found
    assert found.failed == "the attention, or the states that enter the layers, could not be seen."


def test_random_states_have_no_sink_dims():
    failed = discover(*samples(), "a test")
    assert not failed
    assert failed.failed is not None
    assert "no dim stands out" in failed.failed
    assert not failed.standing_out
    strengths, baselines = np.ones((3, 64)), np.ones((3, 64))
    assert discover(strengths * 2, baselines * 2, "a test").failed == "every dim is large for every token."


def test_a_slope_without_a_gap_is_not_cut():
    strengths, baselines = samples()
    baselines[:] = 0.01
    strengths[:, :12] = 9.0 * 0.7 ** np.arange(12)
    failed = discover(strengths, baselines, "a test")
    assert not failed
    assert failed.failed is not None
    assert "no gap" in failed.failed
    assert failed.standing_out


def test_one_prompt_cannot_carry_the_median():
    strengths, baselines = samples(count=7)
    strengths[:3, 17] = 12.0
    assert not discover(strengths, baselines, "a test")
    strengths[:4, 17] = 12.0
    assert discover(strengths, baselines, "a test").indices == (17,)
    assert lower_medians(torch.tensor([[1.0], [2.0], [5.0], [9.0]])).tolist() == [2.0]


def test_layers_and_reference():
    assert list(middle_layers(8)) == [2, 3, 4, 5, 6]
    assert list(middle_layers(4)) == [2]
    assert list(middle_layers(3)) == [1, 2]
    assert list(middle_layers(1)) == [0]
    assert list(attending_layers(8)) == [2, 3, 4, 5]
    assert list(attending_layers(1)) == [0]
    received = np.full((4, 40), 0.02)
    received[:, 39] = 0.9  # one query sees it
    received[1:3, 11], received[0, 3] = 0.4, 1.0
    seen = np.tile(np.arange(40, 0, -1), (4, 1))
    assert reference_token(received, seen.astype(float)) == 11
    received[1:3] = np.nan
    assert reference_token(received, seen.astype(float)) == 3
