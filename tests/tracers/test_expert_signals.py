"""Router scores and the neurons of experts, against the weights, one token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sinklens.tracers import signals as sig
from sinklens.tracers.executor import TracePlan, trace_batch
from sinklens.tracers.experts import router_scores
from tests.families import EXPERTS, FAMILIES, TOP_K

from .naive_states import NaiveBlock, down_of, inner_of, watch
from .test_families import batch_of, opened
from .test_state_signals import STATES, real_rows

MOE = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3"]


def scores_of(family: str, block: NaiveBlock) -> Tensor:
    """DeepSeek-V3 scores every expert by itself; the others share one softmax."""
    assert block.logits is not None
    return block.logits.sigmoid() if family == "deepseek_v3" else block.logits.softmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right", None])
@pytest.mark.parametrize("family", MOE)
def test_router_scores_and_choices(family: str, padding: str | None) -> None:
    model, batch = opened(family), batch_of(family, 14, padding, batch=3)
    if family == "deepseek_v3":  # a bias that changes who is chosen, but not how much they count
        for block in model.anatomy.main.blocks:
            if block.router:
                router: Any = model.module.get_submodule(block.router)
                router.e_score_correction_bias.copy_(torch.linspace(-0.4, 0.4, EXPERTS))
    records = trace_batch(model, batch, TracePlan(signals=STATES)).records
    blocks = watch(model.module, family, batch)
    width = batch.inputs["input_ids"].shape[1]
    seen = 0
    for layer, block in enumerate(blocks):
        for row, record in enumerate(records):
            if block.experts is None:
                assert np.isnan(record["router_score"][layer]).all()
                continue
            rows = row * width + real_rows(batch, row)
            scores, chosen = scores_of(family, block)[rows], block.experts[2][rows]
            # Without attention the leader of a block is the largest norm after the one before.
            leader = 1 + int(blocks[layer - 1].after[row][real_rows(batch, row)].norm(dim=-1)[1:].argmax())
            leader = leader if layer else -1
            np.testing.assert_allclose(record["router_score"][layer, 0], scores[0], rtol=1e-4, atol=1e-6)
            if leader >= 0:
                np.testing.assert_allclose(
                    record["router_score"][layer, 1], scores[leader], rtol=1e-4, atol=1e-6
                )
            else:
                assert np.isnan(record["router_score"][layer, 1]).all()
            others = [pos for pos in range(len(rows)) if pos not in (0, leader)]
            mean = scores[others].mean(0)
            np.testing.assert_allclose(record["router_score_others"][layer], mean, rtol=1e-4, atol=1e-6)
            counts = np.bincount(chosen[others].flatten().numpy(), minlength=EXPERTS) / len(others)
            np.testing.assert_allclose(record["router_frequency_others"][layer], counts, atol=1e-6)
            seen += 1
    assert seen >= 3 * (len(blocks) - FAMILIES[family].dense_layers)


@torch.no_grad()
@pytest.mark.parametrize("family", MOE)
def test_the_chosen_experts_have_the_highest_scores(family: str) -> None:
    """So the scores are those before the choice. DeepSeek-V3 adds a bias and chooses groups first."""
    model, batch = opened(family), batch_of(family, 14)
    for block in watch(model.module, family, batch):
        if block.experts is None:
            continue
        _, _, chosen, weights = block.experts
        assert block.logits is not None
        scores = router_scores(block.logits, chosen, weights)
        assert scores is not None
        assert torch.allclose(scores, scores_of(family, block), atol=1e-6)
        for token, experts in zip(scores, chosen, strict=True):
            allowed = token.clone()
            if family == "deepseek_v3":
                groups = token.view(4, 2).sum(-1)
                allowed[~torch.isin(torch.arange(EXPERTS) // 2, groups.topk(2).indices)] = -1
            assert set(experts.tolist()) == set(allowed.topk(TOP_K).indices.tolist())


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", None])
@pytest.mark.parametrize("family", MOE)
def test_the_neuron_behind_the_largest_output(family: str, padding: str | None) -> None:
    model, batch = opened(family), batch_of(family, 11, padding, batch=3)
    records = trace_batch(model, batch, TracePlan(signals=STATES)).records
    width = batch.inputs["input_ids"].shape[1]
    for layer, block in enumerate(watch(model.module, family, batch)):
        if block.experts is None:
            continue
        module, hidden, _, _ = block.experts
        for row, record in enumerate(records):
            rows = row * width + real_rows(batch, row)
            for expert in range(EXPERTS):
                neuron = int(record["expert_neuron"][layer, expert])
                if record["expert_tokens"][layer, expert] == 0:
                    assert neuron == -1
                    continue
                pos, dim = (int(record[f"expert_max_{axis}"][layer, expert]) for axis in ("pos", "dim"))
                inner = inner_of(module, expert, hidden[rows[pos]])
                assert neuron == int((inner * down_of(module, expert)[0][dim]).abs().argmax())


def test_an_expert_that_is_switched_off_writes_nothing() -> None:
    """What a removed expert would have added is not reported as added."""
    model, batch = opened("mixtral"), batch_of("mixtral", 15)
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            if "down_proj" in name:
                parameter.mul_(5)
    layer, off = 1, frozenset((1, expert) for expert in range(EXPERTS - 1))
    record = trace_batch(model, batch, TracePlan(signals=STATES, ablate=off)).records[0]
    plain = trace_batch(model, batch, TracePlan(signals=STATES)).records[0]
    assert len(set(plain["write_expert"][layer]) - {-1}) > 1
    assert set(record["write_expert"][layer]) <= {-1, EXPERTS - 1}
    error = (
        record["residual_after"] - record["residual_before"] - record["attention_write"] - record["mlp_write"]
    )
    assert np.abs(error).max() < 1e-4


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "shares"])
@pytest.mark.parametrize("normalised", [True, False])
def test_scores_are_recognised_by_the_weights_they_give(function: str, normalised: bool) -> None:
    logits = torch.randn(29, 7, generator=torch.Generator().manual_seed(3))
    scores = logits.sigmoid() if function == "sigmoid" else logits.softmax(-1)
    weights, index = scores.topk(3, -1)
    weights = 2.5 * weights / weights.sum(-1, keepdim=True) if normalised else weights
    given = scores if function == "shares" else logits
    found = router_scores(given, index, weights)
    assert found is not None
    assert torch.allclose(found, scores)


def test_scores_that_do_not_explain_the_weights_are_none() -> None:
    generator = torch.Generator().manual_seed(3)
    logits, weights = torch.randn(29, 7, generator=generator), torch.rand(29, 3, generator=generator)
    assert router_scores(logits, logits.topk(3, -1).indices, weights) is None


def test_one_expert_per_token() -> None:
    """With one slot there is no ratio to compare: the weight must be the score itself."""
    logits = torch.randn(29, 7, generator=torch.Generator().manual_seed(3))
    for scores in (logits.sigmoid(), logits.softmax(-1)):
        weights, index = scores.topk(1, -1)
        found = router_scores(logits, index, weights)
        assert found is not None
        assert torch.allclose(found, scores)
    assert sig.ROUTER_SCORE.unit == "share"
