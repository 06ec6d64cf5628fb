"""Causal verification runs on every text family: all interventions act, whatever the model's attention looks like."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sinklens.analyzers import MassiveActivations, PrimarySinks, Status, SuperExperts
from sinklens.analyzers.base import Finding
from sinklens.analyzers.causal_rules import effect_rows
from sinklens.inputs.spec import Prompt
from sinklens.models.spec import OpenedModel
from sinklens.pipeline.verify import planned_passes, verify
from sinklens.tracers import signals as sig
from sinklens.tracers.executor import TracePlan, trace
from sinklens.tracers.trace import Trace
from tests.families import FAMILIES
from tests.tracers.test_families import opened, settings

TEXT = [name for name, family in FAMILIES.items() if family.kind in ("text", "encoder")]
PLAN = TracePlan(PrimarySinks.needs | MassiveActivations.needs | SuperExperts.needs)


def prompts() -> list[Prompt]:
    """Longer and shorter than most, and one that is too short to be looked at."""
    generator = np.random.default_rng(0)
    made = [(1, *generator.integers(5, 290, size=n - 1).tolist()) for n in (41, 29, 23, 2)]
    return [Prompt(i, ids, tuple(map(str, ids)), f"made:{i}") for i, ids in enumerate(made)]


def claimed(model: OpenedModel, seen: Trace) -> dict[str, Finding]:
    """Findings that claim a sink on position 1, a massive entry and a Super Expert, true or not."""
    primary = PrimarySinks().analyze(seen)
    primary = replace(
        primary,
        status=Status.FOUND,
        rows=[{"position": 1}, {"position": 4}],
        summary={**primary.summary, "strongest_position": 1, "heads": [[2, 0, 1.0], [3, 1, 1.0]]},
    )
    record = seen.records[0]
    position, dim = (int(record[f"residual_top_{axis}"][1, 0]) for axis in ("pos", "dim"))
    massive = replace(
        MassiveActivations().analyze(seen),
        status=Status.FOUND,
        rows=[{"position": position, "dim": dim, "written_at": 1}],
    )
    experts = SuperExperts().analyze(seen)
    if experts.status is not Status.NOT_APPLICABLE:
        busy = np.sum([r[sig.EXPERT_TOKENS][2].clip(0) for r in seen], axis=0)
        experts = replace(experts, rows=[{"layer": 2, "expert": int(busy.argmax()), "kind": "routed"}])
    return {item.analyzer: item for item in (primary, massive, experts)}


@pytest.mark.parametrize("family", TEXT)
def test_every_intervention_acts(family: str) -> None:
    model = opened(family)
    seen = trace(model, prompts(), PLAN)
    findings, before = claimed(model, seen), settings(model.module)
    heard: list[tuple[int, int]] = []
    found = verify(
        model, prompts(), PLAN, seen, findings, seed=1, progress=lambda *given: heard.append(given)
    )
    assert settings(model.module) == before
    assert found["prompts"] == [0, 1, 2]
    assert found["skipped"] == []
    passes, tokens = planned_passes(model, prompts(), seen, findings, seed=1)
    assert heard == [(i + 1, passes) for i in range(passes)]
    assert tokens == 41 + 29 + 23
    kinds = {experiment["kind"] for experiment in found["experiments"]}
    routed = any(block.experts for block in model.anatomy.main.blocks)
    assert kinds == {"massive", "massive-mean", "write", "key", "heads", *(["expert"] if routed else [])}
    for experiment in found["experiments"]:
        if experiment["kind"] != "massive-mean":  # one prompt has the entry, so its mean is its value
            assert experiment["acted"]["edited"] > 0, experiment["name"]
            assert experiment["acted"]["output_change"] > 0, experiment["name"]
        assert experiment["controls"] or experiment["kind"] == "expert"
    _check_numbers(model, found)


def _check_numbers(model: OpenedModel, found: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in effect_rows(found)}
    assert rows["key-1"]["d_sink"] == pytest.approx(1.0, abs=1e-6)
    assert 0 < rows["key-1"]["sink_share_after"] < rows["key-1"]["sink_share_before"]
    assert rows["massive-held"]["remains"] == pytest.approx(0.0, abs=1e-6)
    module: Any = model.module
    speaks = getattr(module, "get_output_embeddings", lambda: None)() is not None
    for row in rows.values():
        touched = row["n_prompts"] > 0
        assert (row["kl"] is not None) == (speaks and touched)
        assert row["kl"] is None or row["kl"] > -1e-6
        assert (row["loss_change"] is not None) == (speaks and touched and model.anatomy.main.causal)
