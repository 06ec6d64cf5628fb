"""Golden cases of the cascade: roles in order of layer, shares, routing of the sink token, what is not known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sinklens.analyzers import Status
from sinklens.analyzers.expert_cascade import ExpertCascade
from sinklens.tracers.trace import PromptRecord

from .made import trace
from .made_chain import chain_record

LENGTH, WIDTH, DEPTH, EXPERTS, SLOTS = 17, 13, 7, 5, 2
Writes = dict[tuple[int, int], float]
"""(layer, expert) to what it adds to the entry, routing weight included."""


def mixture(
    writes: Writes,
    *,
    position: int = 0,
    dim: int = 4,
    weight: float = 0.8,
    attention: dict[int, float] | None = None,
    seed: int = 0,
    looked_up: bool = True,
    **options: Any,
) -> PromptRecord:
    """A random stream in which chosen experts add to one entry; the router sends its token to them."""
    generator = np.random.default_rng(seed)
    start = generator.normal(size=(LENGTH, WIDTH)) * 0.02
    attends, mlp = generator.normal(size=(2, DEPTH, LENGTH, WIDTH)) * 0.02
    start[position, dim] = attends[:, position, dim] = mlp[:, position, dim] = 0
    for layer, value in (attention or {}).items():
        attends[layer, position, dim] = value
    value_of = np.full((DEPTH, EXPERTS), 0.05)
    place = {"pos": np.full((DEPTH, EXPERTS), 3), "dim": np.full((DEPTH, EXPERTS), 1)}
    choice = np.tile([EXPERTS - 1, EXPERTS - 2], (DEPTH, LENGTH, 1))
    score = np.full((DEPTH, 2, EXPERTS), np.nan)
    score[:, 0 if position == 0 else 1] = 0.1
    for (layer, expert), value in writes.items():
        mlp[layer, position, dim] += value
        value_of[layer, expert] = value / weight
        place["pos"][layer, expert], place["dim"][layer, expert] = position, dim
        choice[layer, position] = [expert, 4 if expert < 4 else 3]
        score[layer, 0 if position == 0 else 1, expert] = 0.9
    hidden = start + np.cumsum(attends + mlp, axis=0)
    authors = {(layer, position, dim): (expert, value) for (layer, expert), value in writes.items()}
    arrays = {
        "expert_max": value_of,
        "expert_max_pos": place["pos"],
        "expert_max_dim": place["dim"],
        "expert_neuron": np.arange(EXPERTS)[None].repeat(DEPTH, 0) + 20,
        "expert_tokens": np.full((DEPTH, EXPERTS), 3),
        "router_choice": choice,
        "router_weight": np.tile([weight, 1 - weight], (DEPTH, LENGTH, 1)),
        "router_score": score,
        "router_score_others": np.full((DEPTH, EXPERTS), 0.03),
        "router_frequency_others": np.full((DEPTH, EXPERTS), 0.25),
        "kept_positions": np.arange(LENGTH),
    }
    references = np.array([[0, position if position else -1]] * DEPTH)
    made = chain_record(
        hidden,
        attention=attends,
        start=start,
        references=references,
        authors=authors if looked_up else {},
        **options,
    )
    made.arrays |= arrays
    return made


def cascade(*records: PromptRecord, **settings: Any) -> list[tuple[str, int, int | None, str, Any]]:
    finding = ExpertCascade(**settings).analyze(trace(list(records), experts=EXPERTS))
    return [
        (row["role"], row["layer"], row["expert"], row["kind"], pytest.approx(row["share"]))
        for row in finding.rows
    ]


CHAIN: Writes = {(1, 3): 100.0, (2, 0): 300.0, (4, 1): 100.0, (6, 2): -495.0}


@pytest.mark.parametrize("looked_up", [True, False])
@pytest.mark.parametrize("position", [0, 6])
def test_first_writer_amplifiers_and_eraser(position: int, looked_up: bool) -> None:
    made = mixture(CHAIN, position=position, looked_up=looked_up)
    assert cascade(made) == [
        ("first writer", 1, 3, "routed", 0.2),
        ("amplifies", 2, 0, "routed", 0.6),
        ("amplifies", 4, 1, "routed", 0.2),
        ("erases", 6, 2, "routed", -0.99),
    ]
    finding = ExpertCascade().analyze(trace([made], experts=EXPERTS))
    assert finding.status is Status.FOUND
    assert finding.summary["first_writer"] == "L1E3"
    assert finding.summary["amplifiers"] == ["L2E0", "L4E1"]
    assert finding.summary["erasers"] == ["L6E2"]
    assert finding.summary["share_written"] == pytest.approx(1.0)
    assert (
        "L1E3 (+20 %) writes first; L2E0 (+60 %), L4E1 (+20 %) amplify; L6E2 (-99 %) erases"
        in finding.verdict
    )


def test_the_router_is_compared_between_the_sink_token_and_the_others() -> None:
    row = ExpertCascade().analyze(trace([mixture(CHAIN)], experts=EXPERTS)).rows[0]
    assert row["router_score"] == pytest.approx(0.9)
    assert row["router_score_others"] == pytest.approx(0.03)
    assert row["router_ratio"] == pytest.approx(30)
    assert (row["chosen"], row["chosen_others"]) == (1.0, 0.25)
    assert row["routing_weight"] == pytest.approx(0.8)
    assert row["neuron"] == 23
    assert row["value"] == pytest.approx(100)


def test_a_start_by_attention_or_a_dense_block_is_named() -> None:
    made = mixture({(3, 1): 300.0}, attention={1: 200.0})
    assert cascade(made) == [
        ("first writer", 1, None, "attention", 0.4),
        ("amplifies", 3, 1, "routed", 0.6),
    ]
    verdict = ExpertCascade().analyze(trace([made], experts=EXPERTS)).verdict
    assert "attention of block 1 (+40 %) writes first" in verdict


def test_without_a_routed_expert_in_it_nothing_is_found() -> None:
    made = mixture({}, attention={1: 500.0})
    finding = ExpertCascade().analyze(trace([made], experts=EXPERTS))
    assert finding.status is Status.NOT_FOUND
    assert "No routed expert has a large part" in finding.verdict


def test_an_expert_of_a_few_prompts_only_is_no_member() -> None:
    records = [mixture(CHAIN, seed=i, index=i) for i in range(5)]
    records.append(mixture({**CHAIN, (3, 4): 200.0}, seed=9, index=5))
    finding = ExpertCascade().analyze(trace(records, experts=EXPERTS))
    assert [row["expert"] for row in finding.rows] == [3, 0, 1, 2]
    assert finding.rows[0]["n_prompts"] == 6


def test_a_token_whose_routing_is_unknown_says_so() -> None:
    made = mixture(CHAIN)
    made["router_score"][:] = np.nan
    made.arrays["kept_positions"] = np.arange(LENGTH) + 100
    finding = ExpertCascade().analyze(trace([made], experts=EXPERTS))
    assert [row["expert"] for row in finding.rows][:2] == [3, 0]
    assert finding.rows[0]["router_score"] is finding.rows[0]["chosen"] is None
    assert any("Router scores were not recorded" in note for note in finding.notes)
    assert any("routing of this position was not kept" in note for note in finding.notes)
    assert [figure.key for figure in finding.figures] == ["cascade", "value"]


def test_the_cause_stands_beside_the_size_where_it_was_measured() -> None:
    made = trace([mixture(CHAIN)], experts=EXPERTS)

    def measured(experts: list[list[int]], lost: float) -> dict[str, Any]:
        effect = {"sink_lost": {"mean": lost}, "d_sink": {"mean": lost / 2}}
        return {"target": {"experts": experts}, "effect": effect}

    made.manifest["experiments"] = {
        "effects": {
            "experiments": [
                measured([[1, 3]], 0.9),
                measured([[2, 0]], 0.2),
                measured([[1, 3], [2, 0]], 0.95),
                {"target": {"position": 0}, "failed": "no place for it"},
            ]
        }
    }
    finding = ExpertCascade().analyze(made)
    assert [row["sink_lost"] for row in finding.rows] == [0.9, 0.2, None, None]
    assert [row["d_sink"] for row in finding.rows] == [0.45, 0.1, None, None]
    assert finding.summary["largest_sink_lost_by"] == "L1E3"


def test_dense_models_and_flat_streams_are_not_applicable() -> None:
    made = mixture(CHAIN)
    finding = ExpertCascade().analyze(trace([made]))
    assert "is dense" in (finding.reason or "")
    finding = ExpertCascade().analyze(trace([mixture({})], experts=EXPERTS))
    assert "no token has an entry" in (finding.reason or "")
    del made.arrays["residual_after"]
    finding = ExpertCascade().analyze(trace([made], experts=EXPERTS))
    assert "profile again" in (finding.reason or "")
    empty = trace([made], experts=EXPERTS)
    empty.records = []
    assert ExpertCascade().analyze(empty).status is Status.NOT_APPLICABLE


def test_shares_are_means_over_prompts() -> None:
    records = [
        mixture({(1, 3): value, (3, 0): 400.0 - value}, seed=i, index=i)
        for i, value in enumerate((100.0, 300.0))
    ]
    assert cascade(*records) == [
        ("first writer", 1, 3, "routed", 0.5),
        ("amplifies", 3, 0, "routed", 0.5),
    ]
