"""What causal effects say where there is no sink, where entries are erased, and whose means and controls these are."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from sinklens.analyzers import Status
from sinklens.analyzers.causal_rules import CARRIES, NO_EFFECT, NOTHING_TO_LOSE
from sinklens.pipeline import verify
from sinklens.pipeline.causes import followed
from sinklens.pipeline.controls import Spike
from sinklens.pipeline.matched import Matched, calibrated, match
from sinklens.testbeds import MassivePlant, SinkPlant, plant, random_control
from sinklens.tracers import signals as sig
from sinklens.tracers.interventions import MedianEntriesZeroed

from .test_verify import COMMON, llama, prompts, rows, verified


def sinkless(seed: int) -> Any:
    """Large random weights: the attention is uneven, but no position is a sink."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6, "head_dim": 8}
    config = Qwen3MoeConfig(
        **{**COMMON, **sizes},
        intermediate_size=80,
        moe_intermediate_size=24,
        num_experts=5,
        num_experts_per_tok=2,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(6.0)
    return model


@pytest.mark.parametrize("seed", [1, 3])
def test_what_is_no_sink_cannot_be_lost(seed: int) -> None:
    run = verified(sinkless(seed), prompts(seed, n=4))
    assert run.primary_sinks.status is Status.NOT_FOUND
    finding = run.causal_effects
    assert finding.verdict.startswith("There is no sink to lose: no position is an attention sink here.")
    assert finding.tiles == []
    for row in finding.rows:
        assert row["verdict"] == NOTHING_TO_LOSE
        assert row["sink_lost"] is None
        assert row["d_sink"] is None
    assert "the sink's share goes" not in run.super_experts.verdict
    assert "the sink hangs on" not in run.super_experts.verdict


def erased() -> Any:
    """A sink in blocks 1 and 2, before the entry that an eraser takes away again in block 6 of 8."""
    model = random_control(LlamaConfig(**{**COMMON, "num_hidden_layers": 8}, intermediate_size=112), 2)
    plant(
        model,
        sinks=[SinkPlant(heads=[(1, 0), (1, 2), (2, 1)], strength=9)],
        massive=[MassivePlant(dim=7, layer_in=2, layer_out=6)],
    )
    return model


def test_an_eraser_without_its_entry_is_not_the_entry_coming_back() -> None:
    run = verified(erased(), prompts(4))
    found = rows(run)
    for name in ("massive-zero", "massive-held"):
        assert found[name]["verdict"] == NO_EFFECT
        assert found[name]["remains"] == pytest.approx(0.0, abs=0.02)
    assert "came back" not in run.causal_effects.verdict
    assert all(row["remains"] is None or abs(row["remains"]) < 2 for row in found.values())


def test_the_control_of_held_entries_is_held_in_as_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[Matched] = []

    def catching(*args: Any, **options: Any) -> Matched:
        caught.append(match(*args, **options))
        return caught[-1]

    monkeypatch.setattr(verify, "match", catching)
    verified(erased(), prompts(4, n=3))
    tried = {experiment.name: experiment for experiment in caught[-1].experiments}
    for name, blocks in (("massive-zero", 1), ("massive-held", 6)):
        places = changed(tried[name].intervention)
        assert places == Counter(
            {(prompt, layer): 1 for prompt in range(3) for layer in range(2, 2 + blocks)}
        )
        shifted, median = tried[name].controls
        assert len(shifted.draws) == 2
        for draw in (*shifted.draws, *median.draws):
            assert changed(draw) == places
    for control in tried["massive-held"].controls:
        assert control.what.endswith("in every later block too")


def changed(intervention: Any) -> Counter[tuple[int, int]]:
    """How many entries are changed in each prompt and block."""
    if isinstance(intervention, MedianEntriesZeroed):
        return Counter({(prompt, layer): n for prompt, layer, n in intervention.counts})
    return Counter((entry.prompt, entry.layer) for entry in intervention.entries)


def test_held_controls_are_as_far_from_zero_as_the_entry_in_each_block() -> None:
    run = verified(erased(), prompts(4, n=3))
    record = run.trace.records[1]
    first = Spike(record.index, 2, 0, 7, 500.0)
    path = followed(run.trace, [first], 8)
    assert [spike.layer for spike in path] == [2, 3, 4, 5, 6, 7]
    assert [spike.value for spike in path[:4]] == pytest.approx([500.0] * 4, rel=0.01)
    # Where it is erased it is none of the strongest, so it is at most as large as the smallest of them.
    for spike in path[4:]:
        assert 0 < spike.value <= np.abs(record[sig.RESIDUAL_TOP][spike.layer]).min()


def mean_row(n: int) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    model = random_control(llama(), 0)
    plant(model, sinks=[SinkPlant(heads=[(2, 0), (3, 3)])], massive=[MassivePlant(dim=7, layer_in=1)])
    run = verified(model, prompts(3, n=n))
    effects = run.trace.manifest["experiments"]["effects"]
    assert rows(run)["massive-zero"]["verdict"] == CARRIES
    return rows(run)["massive-mean"], effects["calibration"], run.causal_effects.notes


def test_means_are_those_of_other_prompts_only_where_there_are_others() -> None:
    row, calibration, _ = mean_row(8)
    assert calibration["held_out"] is False
    assert calibration["prompts"] == 8
    assert row["intervention"].endswith("set to the signed mean of all prompts, the tried ones among them")
    row, calibration, _ = mean_row(10)
    assert calibration["held_out"] is True
    assert calibration["prompts"] == 2
    assert row["intervention"].endswith("set to the signed mean of other prompts")


def test_an_entry_that_no_other_prompt_has_keeps_all_means_on_all_prompts() -> None:
    """One mean from other prompts and one from the tried ones would be a mixture that no word describes."""
    mine = [Spike(0, 2, 0, 7, 500.0), Spike(0, 2, 0, 9, -300.0)]
    others = [Spike(8, 2, 0, 7, 400.0)]
    means, prompts_behind, held_out = calibrated([*mine, *others], mine, {0: 48})
    assert means == {(2, True, 7): 450.0, (2, True, 9): -300.0}
    assert (prompts_behind, held_out) == (2, False)
    both = [*others, Spike(9, 2, 0, 9, -100.0)]
    means, prompts_behind, held_out = calibrated([*mine, *both], mine, {0: 48})
    assert means == {(2, True, 7): 400.0, (2, True, 9): -100.0}
    assert (prompts_behind, held_out) == (2, True)
