"""Conditions that no outcome can meet are refused before anything is run; all others are let through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sinklens
from sinklens.analyzers import Analyzer, registry
from sinklens.analyzers.base import FINDING_FIELDS, Finding, Status
from sinklens.cli.main import main
from sinklens.core.errors import GateError, UsageError
from sinklens.pipeline import prepare
from sinklens.pipeline.gate import check_gate, check_paths

EVERY = [name for name, _ in registry.items()]


def refused(capsys: Any, *arguments: str) -> str:
    assert main([*arguments]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.fixture
def _no_model(monkeypatch: Any) -> None:
    """Opening a model fails, and so does a test that comes so far."""
    monkeypatch.setattr(prepare, "open_with", lambda *_, **__: pytest.fail("a model was opened"))


@pytest.mark.usefixtures("_no_model")
@pytest.mark.parametrize(
    ("condition", "says"),
    [
        ("primary-sinks.sink_rat > 1", "primary-sinks has no 'sink_rat'.\nDid you mean 'sink_rate'"),
        ("primary_sinks.Sink_Rate > 1", "Did you mean 'sink_rate'"),
        ("verdict.state == sink", "verdict has no 'state'.\nDid you mean 'status'"),
        ("model.layer > 1", "model has no 'layer'.\nDid you mean 'layers'"),
        ("primary-sinks > 1", "primary-sinks is no number; name a field of it.\nIt has: sink_rate"),
        ("super-experts.rows.0 > 1", "super-experts has no 'rows.0'"),
        ("primary-sinks.parameters == 1", "has no 'parameters'"),
        ("super-expert.rows > 1", "this run will have no 'super-expert'"),
        ("fai.n_anchors > 1", "this run will have no 'fai'"),
        ("verdict.status == sinks", "verdict.status is never 'sinks'.\nDid you mean 'sink'"),
        ("verdict.status == Sink", "verdict.status is never 'Sink'.\nDid you mean 'sink'"),
        ("verdict.status != 1", "It is sink or no-sink or untrusted or unknown."),
        ("primary-sinks.status == 'fond'", "Did you mean 'found'"),
        ("primary-sinks.status > found", "is a word, neither larger nor smaller than found"),
        ("super_experts.percentile_used == yess", "It is true or false."),
    ],
)
def test_what_cannot_be_is_refused_before_the_run(
    condition: str, says: str, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "run"
    assert says in refused(capsys, "profile", "--out", str(out), "--fail-if", condition)
    assert says in refused(capsys, "profile", "--dry-run", "--fail-if", condition)
    if "super" not in condition:  # `mitigate` does not ask for them
        asked = ("mitigate", "--with", "act", "--out", str(out), "--fail-if", condition)
        assert says in refused(capsys, *asked)
    assert not out.exists()


@pytest.mark.usefixtures("_no_model")
def test_of_a_mitigation_only_the_name_is_known_before(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(pytest.fail.Exception, match="a model was opened"):  # whatever the task's metrics are
        main(
            ["mitigate", "-q", "--with", "act", "--out", str(tmp_path), "--fail-if", "act.anything_delta < 0"]
        )
    capsys.readouterr()
    said = refused(capsys, "mitigate", "--with", "act", "--fail-if", "acts.accuracy < 0")
    assert "Did you mean 'act'" in said


def test_every_field_of_every_finding_is_let_through(monkeypatch: Any) -> None:
    """Also such as only a run of pictures, samples or experiments has; what is not declared is not refused."""
    for name in EVERY:
        summarised = registry[name].summarises
        assert summarised is not None
        assert len(set(summarised)) == len(summarised)
        words = {"status": ("found",), **dict(registry[name].answers)}
        assert words.keys() <= {*summarised, *FINDING_FIELDS}
        fields = {field: words.get(field, ("1",)) for field in (*summarised, *FINDING_FIELDS)}
        check_paths([f"{name}.{field} == {word}" for field in fields for word in fields[field]], EVERY)
    finding = Finding("x", "X", Status.FOUND, "")
    assert {*FINDING_FIELDS} == {
        key for key, value in finding.to_json().items() if not isinstance(value, dict)
    }
    monkeypatch.setattr(registry["writers"], "summarises", Analyzer.summarises)
    check_paths(["writers.whatever > 1"], EVERY)
    run = sinklens.profile("bundled:moe-ind", n=4, verify=False)
    for part in ("verdict", "model"):
        check_paths([f"{part}.{field} == {value}" for field, value in run.document[part].items()], ())
    for name, found in run.document["findings"].items():
        for field, value in {**{field: found[field] for field in FINDING_FIELDS}, **found["summary"]}.items():
            check_paths([f"{name}.{field} == {value if value != '' else 'x'}"], [name])
            assert not isinstance(value, bool) or field in dict(registry[name].answers)
    with pytest.raises(GateError):
        check_gate("primary-sinks.rows > 0", run.document)


def test_a_resumed_run_is_asked_for_what_it_began_with(tmp_path: Path, capsys: Any) -> None:
    """Not for the default analyzers, which it may have left out, and beyond which it may go."""
    out = str(tmp_path / "run")
    assert main(["profile", "-q", "-n", "4", "--no-verify", "--analyzers", "waad,fai", "--out", out]) == 0
    assert main(["profile", "-q", "--resume", out, "--fail-if", "fai.n_anchors < 0"]) == 0
    capsys.readouterr()
    said = refused(capsys, "profile", "--resume", out, "--fail-if", "primary-sinks.sink_rate > 1")
    assert "this run will have no 'primary-sinks'" in said
    assert "waad" in said


def test_an_expression_without_operator() -> None:
    with pytest.raises(UsageError, match="path operator value"):
        check_paths(["verdict.status"], ())


def test_yes_and_no_may_be_written_in_capitals_and_quotes() -> None:
    for word in ("True", "FALSE", "'true'"):
        check_paths([f"super-experts.percentile_used == {word}"], EVERY)


def test_what_is_said_of_a_mitigation_in_words_is_known_before(capsys: Any) -> None:
    for condition, says in (
        ("act.judgement == harmfull", "act.judgement is never 'harmfull'.\nDid you mean 'harmful'"),
        ("act.acted == yes", "It is true or false."),
    ):
        assert says in refused(capsys, "mitigate", "--with", "act", "--fail-if", condition)
