"""Golden cases of Super Experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sinklens.analyzers import Status, SuperExperts
from sinklens.tracers.trace import PromptRecord, Trace

from .made import record, trace
from .test_causal_effects import effects, experiment

T, D = 7, 13


def experts(
    size: np.ndarray,
    *,
    spikes: dict[int, tuple[int, int, float]] | None = None,
    first: np.ndarray | None = None,
) -> PromptRecord:
    """A record with expert maxima `[layer, expert]` (at position 0, dim 5) and residual spikes by layer."""
    layers = len(size)
    hidden = np.random.default_rng(0).normal(size=(layers, T, D))
    for layer, (pos, dim, value) in (spikes or {}).items():
        hidden[layer, pos, dim] = value
    return record(
        None,
        hidden,
        expert_max=size.astype(float),
        expert_max_pos=np.where(np.isnan(size), -1, 0).astype(int),
        expert_max_dim=np.where(np.isnan(size), -1, 5).astype(int),
        expert_first_row=(size if first is None else first).astype(float),
        expert_tokens=(~np.isnan(size)).astype(int) * 3,
        kept_positions=np.arange(T),
        router_choice=np.zeros((layers, T, 1), dtype=int),
        router_weight=np.full((layers, T, 1), 0.75),
    )


def large(n_layers: int = 10, n_experts: int = 30, seed: int = 0, **top: float) -> np.ndarray:
    size = np.random.default_rng(seed).uniform(0.5, 2.0, size=(n_layers, n_experts))
    for name, value in top.items():
        layer, expert = (int(part) for part in name[1:].split("_"))
        size[layer, expert] = value
    return size


def moe(*records: PromptRecord, **layer: Any) -> Trace:
    return trace(list(records), experts=30, down_proj=False, **layer)


def named(finding: Any) -> list[tuple[int, int]]:
    return [(row["layer"], row["expert"]) for row in finding.rows]


def test_three_planted_experts_are_found_in_order() -> None:
    made = moe(experts(large(e1_4=744, e2_9=540, e3_2=430)))
    finding = SuperExperts().analyze(made)
    # P99.5 of 300 values lies below the second largest only, so the percentile alone names two.
    assert named(finding) == [(1, 4), (2, 9)]
    assert named(SuperExperts(percentile=99).analyze(made)) == [(1, 4), (2, 9), (3, 2)]
    assert finding.rows[0]["rank"] == 1
    assert finding.rows[0]["share_of_sink_token"] == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_random_experts_give_none(seed: int) -> None:
    assert SuperExperts().analyze(moe(experts(large(seed=seed)))).status is Status.NOT_FOUND
    small = np.random.default_rng(seed).uniform(0.5, 2.0, size=(4, 8))
    assert SuperExperts().analyze(moe(experts(small))).status is Status.NOT_FOUND


def test_few_experts_need_a_spike_instead_of_a_percentile() -> None:
    size = np.full((4, 8), 0.2)
    size[1, 3], size[2, 6] = 500.0, 400.0
    both = experts(size, spikes={1: (0, 5, 500.0), 2: (0, 5, 900.0)})
    assert named(SuperExperts().analyze(moe(both))) == [(1, 3), (2, 6)]
    without = experts(size, spikes={1: (0, 5, 500.0)})
    finding = SuperExperts().analyze(moe(without))
    assert named(finding) == [(1, 3)]
    assert any("cannot select more than one" in note for note in finding.notes)


def test_the_code_recipe_uses_floor_division() -> None:
    # The maximum is 9: 9 // 10 = 0, so the code keeps everything above the percentile; the paper asks for > 0.9.
    size = np.full((10, 30), 0.01)
    size[1, 1], size[2, 2] = 9.0, 0.8
    paper = SuperExperts(percentile=99).analyze(moe(experts(size)))
    code = SuperExperts(percentile=99, recipe="code").analyze(moe(experts(size)))
    assert named(paper) == [(1, 1)]
    assert named(code) == [(1, 1), (2, 2)]


def test_the_code_recipe_reads_the_first_row_and_the_first_three_quarters() -> None:
    size = large(e1_4=744, e8_9=540)
    first = large(e1_4=744, e8_9=540) * 0.5
    made = moe(experts(size, first=first))
    code = SuperExperts(recipe="code", percentile=99).analyze(made)
    assert named(code) == [(1, 4)]
    assert code.rows[0]["abs_max"] == pytest.approx(372)
    assert named(SuperExperts(percentile=99).analyze(made)) == [(1, 4), (8, 9)]


def test_unrouted_experts_have_no_value_and_are_counted() -> None:
    size = large(e1_4=744)
    size[5, 7] = np.nan
    finding = SuperExperts().analyze(moe(experts(size)))
    assert finding.summary["experts_seen"] == 299
    assert any("1 of 300 experts received no token" in note for note in finding.notes)


def test_a_shared_expert_can_be_super() -> None:
    made = experts(large(e1_4=100))
    made.arrays["down_proj_top"] = np.full((10, 2), 0.5)
    made.arrays["down_proj_top"][3, 0] = 700.0
    made.arrays |= {"down_proj_top_pos": np.zeros((10, 2), int), "down_proj_top_dim": np.full((10, 2), 6)}
    finding = SuperExperts().analyze(moe(made, shared_expert=True))
    assert (finding.rows[0]["layer"], finding.rows[0]["expert"], finding.rows[0]["kind"]) == (3, -1, "shared")


def test_dense_models_are_not_applicable() -> None:
    finding = SuperExperts().analyze(trace([record(None, np.ones((2, 5, 7)))]))
    assert finding.status is Status.NOT_APPLICABLE
    assert "dense" in str(finding.reason)


def pruned(layer: int, expert: int, lost: float) -> dict[str, Any]:
    target = {"experts": [[layer, expert]]}
    return experiment(
        f"expert-L{layer}E{expert}", "expert", lost, target=target, left=1 - lost, cosine=1 - lost
    )


def test_the_expert_that_carries_the_sink_is_named_though_another_is_larger() -> None:
    made = moe(experts(large(e1_4=744, e2_9=540)))
    made.manifest = {
        "experiments": {"effects": effects(pruned(1, 4, 0.0), pruned(2, 9, 0.95), pruned(3, 2, 0.02))}
    }
    finding = SuperExperts().analyze(made)
    assert [row["sink_lost"] for row in finding.rows] == [0.0, 0.95]
    assert [row["without_it"] for row in finding.rows] == [
        "no effect: the strong entries come from elsewhere",
        "carries the sink",
    ]
    ranking = [(row["layer"], row["expert"], row["size_rank"]) for row in finding.summary["causal_ranking"]]
    assert ranking[0] == (2, 9, 2)
    assert finding.verdict.endswith(
        "By effect the sink hangs on L2E9, number 2 by size: without it 95 % of the sink is lost, not on the "
        "largest, L1E4 (0 %)."
    )


def test_no_second_carrier_is_named_where_the_largest_expert_is_the_one() -> None:
    made = moe(experts(large(e1_4=744)))
    together = pruned(1, 4, 0.9)
    made.manifest = {"experiments": {"effects": effects(together)}}
    finding = SuperExperts(percentile=99.7).analyze(made)
    assert named(finding) == [(1, 4)]
    assert "By effect" not in finding.verdict
    assert "Without it the sink's share goes from 40.0 % to 13.0 %" in finding.verdict
    assert "without another expert of the same layer it is 40.0 %" in finding.verdict
    assert finding.summary["sink_rate_without_them"] == pytest.approx(5.0)


def test_an_expert_below_the_rule_can_carry_the_sink() -> None:
    made = moe(experts(large(seed=3)))
    made.manifest = {"experiments": {"effects": effects(pruned(2, 9, 0.8))}}
    finding = SuperExperts().analyze(made)
    assert finding.status is Status.NOT_FOUND
    assert "By effect the sink hangs on L2E9" in finding.verdict


def test_without_the_second_look_nothing_is_said_of_causes() -> None:
    finding = SuperExperts().analyze(moe(experts(large(e1_4=744))))
    assert finding.summary["causal_ranking"] == []
    assert "sink_lost" not in finding.rows[0]
