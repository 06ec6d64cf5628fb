"""The rule at every epsilon of a page's grid says what a new analysis says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sinklens.analyzers import PrimarySinks, Status
from sinklens.core.adjustable import epsilons
from sinklens.pipeline.verdict import judge
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import Trace

from .made import record, states, trace


def mixed(seed: int, prompts: int = 3, *, sampled: bool = False, window: int = 0) -> Trace:
    """Prompts of different lengths whose heads sink on several positions; a layer without attention, few kept."""
    rng = np.random.default_rng(seed)
    strong = rng.uniform(0, 5, (3, 5))
    records = []
    for index in range(prompts):
        length = int(rng.integers(37, 61))
        logits = rng.normal(size=(3, 5, length, length))
        for place, position in enumerate((0, 1, 7, 13)):
            logits[:, :, :, position] += (strong * (0.4, 1.0, 0.6, 0.8)[place] + rng.normal(size=(3, 5)))[
                ..., None
            ]
        seen = np.tril(np.ones((length, length), bool))
        if window:
            seen &= ~np.tril(np.ones((length, length), bool), -window)
        weights = np.where(seen, np.exp(logits), 0)
        weights /= weights.sum(-1, keepdims=True)
        hidden = states(3, length, 11, seed)
        hidden[1:, 7] *= 100
        made = record(weights, hidden, index=index, seen=seen)
        made.arrays["attention_received"][2] = np.nan
        kept = np.sort(np.argsort(-made.arrays["attention_received_peak"])[:9])
        for name in ("attention_received", "attention_self", "attention_top1"):
            made.arrays[name] = made.arrays[name][:, :, kept].astype(np.float32)
        made.arrays["kept_positions"] = kept
        if sampled:
            made.arrays[sig.SAMPLED_ROWS] = np.arange(0, length, 2)
            shape = made.arrays["attention_received"].shape
            made.arrays[sig.ATTENTION_RECEIVED.name + sig.ERROR] = rng.uniform(0, 0.1, shape)
        records.append(made)
    return trace(records)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recipe": "code"},
        {"exclude_diagonal": True},
        {"min_rate": 0.0, "min_prompts": 0.0},
        {"min_prompts": 1.0, "min_lift": 3.0, "epsilon": 0.137},
        {"min_prompts": 1.1, "min_rate": 0.05},
    ],
)
@pytest.mark.parametrize(("sampled", "window"), [(False, 0), (True, 0), (False, 11)])
def test_every_epsilon_says_what_a_new_analysis_says(
    options: dict[str, Any], sampled: bool, window: int
) -> None:
    analyzer = PrimarySinks(**options)
    seen = mixed(3, sampled=sampled, window=window)
    own = analyzer.analyze(seen)
    assert own.swept is not None
    swept = own.swept()
    assert list(swept) == epsilons(analyzer.epsilon).tolist()
    for epsilon, found in swept.items():
        again = replace(analyzer, epsilon=epsilon).analyze(seen)
        assert (found.status, found.verdict, found.tiles, found.notes) == (
            again.status,
            again.verdict,
            again.tiles,
            again.notes,
        ), epsilon
        assert found.rows[:1] == again.rows[:1]
        assert [row["position"] for row in found.rows] == [row["position"] for row in again.rows]
        assert judge({"primary-sinks": found}, []) == judge({"primary-sinks": again}, [])
    assert swept[analyzer.epsilon].verdict == own.verdict


def test_the_sweep_meets_every_case() -> None:
    findings = [finding for seed in range(4) for finding in made(seed)]
    assert {finding.status for finding in findings} == {Status.FOUND, Status.NOT_FOUND}
    strongest = {finding.rows[0]["position"] for finding in findings if finding.rows}
    assert len(strongest) > 1
    assert len({tuple(finding.notes) for finding in findings}) > 1
    assert any(len(finding.rows) > 2 for finding in findings)
    assert any(finding.rows and not finding.rows[0]["n_heads"] for finding in findings)


def made(seed: int) -> list[Any]:
    own = PrimarySinks(min_prompts=1.0).analyze(mixed(seed))
    assert own.swept is not None
    return list(own.swept().values())


def test_a_share_on_a_threshold_is_not_above_it() -> None:
    """0.29 as float32 is above 0.29, 0.3 likewise; 0.31 is below: compared as the analyzer compares."""
    seen = mixed(1, 1)
    at = seen.records[0].arrays["attention_received"]
    at[...] = np.where(np.isnan(at), np.nan, np.float32(0.001))
    at[0, :3, 0] = [0.29, 0.3, 0.31]
    own = PrimarySinks(min_lift=0.0).analyze(seen)
    assert own.swept is not None
    for epsilon, found in own.swept().items():
        again = PrimarySinks(min_lift=0.0, epsilon=epsilon).analyze(seen)
        assert found.verdict == again.verdict
