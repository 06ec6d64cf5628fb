"""A profile estimated from some query rows: never silent, near the truth, and the exact one where it takes all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sinklens as sl
from sinklens.core.errors import UsageError
from sinklens.pipeline.run import Run
from sinklens.tracers import signals as sig
from tests.families import build

ASKED: dict[str, Any] = {
    "prompts": "corpus:mixed", "pack": True, "n": 3, "seq_len": 256, "verify": False,
    "analyzers": ("primary-sinks", "massive-activations", "secondary-sinks", "head-classes", "attention-entropy"),
}  # fmt: skip


@pytest.fixture(scope="module")
def exact() -> Run:
    return sl.profile("bundled:dense-ind", **ASKED)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: Any) -> Run:
    return sl.profile(
        "bundled:dense-ind", sample_queries=0.5, out=tmp_path_factory.mktemp("run") / "run", **ASKED
    )


def test_the_verdict_the_notes_the_manifest_and_the_report_say_that_numbers_are_estimates(
    sampled: Run,
) -> None:
    assert "Estimated from 128 of 256 query rows" in sampled.verdict.text
    assert "±" in sampled.verdict.text
    assert sampled.findings["primary-sinks"].notes[0].startswith("Shares and rates are estimates.")
    document = json.loads((Path(str(sampled.folder)) / "summary.json").read_text(encoding="utf-8"))
    said = document["manifest"]["tracing"]["sampling"]
    assert said["share"] == 0.5
    assert said["seed"] == 0
    assert said["not_estimated"]["attention_self"]
    assert any("128 of 256 per prompt" in warning for warning in document["manifest"]["inputs"]["warnings"])
    assert "Estimated from 128 of 256 query rows" in (Path(str(sampled.folder)) / "report.html").read_text(
        encoding="utf-8"
    )
    summary = sampled.findings["primary-sinks"].summary
    assert summary["rows_sampled"] == 128
    assert summary["rate_low"] <= summary["sink_rate"] <= summary["rate_high"]
    assert 0 < summary["share_se"] < 0.02


def test_estimates_are_near_the_truth_by_their_own_standard_errors(sampled: Run, exact: Run) -> None:
    for found, truth in zip(sampled.trace, exact.trace, strict=True):
        assert len(found.arrays[sig.SAMPLED_ROWS]) == 128
        np.testing.assert_array_equal(found[sig.VISIBLE_QUERIES], truth[sig.VISIBLE_QUERIES])
        for name in ("attention_received_mean", "attention_entropy", "attention_entropy_normalised"):
            error = found.arrays[name + sig.ERROR]
            assert error.shape == found[name].shape
            off = np.abs(found[name] - truth[name])
            # What a key gets from one row alone (its own, or the next) is missed with the row.
            one = 1 / np.maximum(truth[sig.VISIBLE_QUERIES], 1) if name.endswith("mean") else 0.0
            assert (off <= 5 * error + one + 1e-5).mean() > 0.99, name
        both, a, b = np.intersect1d(found["kept_positions"], truth["kept_positions"], return_indices=True)
        assert len(both) >= 16
        off = found["attention_received"][..., a] - truth["attention_received"][..., b]
        one = 1 / np.maximum(truth[sig.VISIBLE_QUERIES][:, None, both], 1)
        assert (np.abs(off) <= 5 * found.arrays["attention_received_se"][..., a] + one).mean() > 0.99
        # What is not about queries, and what is about the last ones alone, is what it is.
        for name in ("residual_norm", "residual_top", "tail_entropy"):
            np.testing.assert_array_equal(found[name], truth[name])


def test_what_a_sample_cannot_answer_says_why(sampled: Run, exact: Run) -> None:
    findings = sampled.findings
    assert "attention_self" in str(findings["secondary-sinks"].reason)
    assert "column_entropy" in str(findings["attention-entropy"].reason)
    assert "biased" in str(findings["attention-entropy"].reason)
    assert findings["massive-activations"].to_json() == exact.findings["massive-activations"].to_json()
    assert findings["head-classes"].summary == exact.findings["head-classes"].summary
    assert "sampling" not in exact.trace.tracing
    assert "stimated from" not in str(exact.document)


def test_the_self_check_holds_two_halves_of_the_rows_against_all(sampled: Run) -> None:
    (check,) = [check for check in sampled.checks if check.name.startswith("sampled rows")]
    assert check.passed
    assert check.value is not None
    assert check.value < 1e-5


def test_a_sample_of_all_rows_is_the_exact_run(exact: Run) -> None:
    run = sl.profile("bundled:dense-ind", sample_queries=256, **ASKED)
    assert {n: f.to_json() for n, f in run.findings.items()} == {
        n: f.to_json() for n, f in exact.findings.items()
    }
    for found, truth in zip(run.trace, exact.trace, strict=True):
        for name, array in truth.arrays.items():
            np.testing.assert_array_equal(found.arrays[name], array)
    assert any("none is left out" in warning for warning in run.trace.manifest["inputs"]["warnings"])


def test_another_seed_looks_at_other_rows(sampled: Run) -> None:
    other = sl.profile("bundled:dense-ind", sample_queries="50%", seed=1, **ASKED)
    rows = [run.trace.records[0].arrays[sig.SAMPLED_ROWS] for run in (sampled, other)]
    assert len(rows[0]) == len(rows[1])
    assert (rows[0] != rows[1]).any()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"sample_queries": "many"}, "a number of query rows"),
        ({"sample_queries": 1.5}, "a number of query rows"),
        ({"sample_queries": 40}, "at least 96 rows"),
        ({"sample_queries": 0.5, "mode": "fused"}, "saves nothing with --mode fused"),
        ({"sample_queries": 0.5, "backend": "transformer-lens"}, "the transformer-lens backend shows whole"),
    ],
)
def test_what_cannot_be_sampled_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        sl.profile("bundled:dense-ind", **{**ASKED, **asked})


def test_families_that_do_not_route_are_refused() -> None:
    model, tokenizer = build("bloom"), None
    with pytest.raises(UsageError, match="read from its own weights"):
        sl.profile(
            model, tokenizer=tokenizer, prompts=[list(range(3, 150))], sample_queries=0.7, verify=False
        )
