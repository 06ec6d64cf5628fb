"""Which experiments run after the main pass, and what is said of those that do not."""

from __future__ import annotations

from typing import Any

import pytest

import sinklens
from sinklens.core.errors import ResourceError
from sinklens.pipeline import experiments

NAMED = ("primary-sinks", "causal-effects")


def skipped(run: Any) -> dict[str, str]:
    return run.trace.manifest["experiments_skipped"]


def test_a_short_verification_runs_by_itself() -> None:
    run = sinklens.profile(n=3, analyzers=NAMED)
    assert "effects" in run.trace.manifest["experiments"]
    assert run.causal_effects.reason is None
    assert skipped(run) == {}


def test_a_long_one_says_how_long_it_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "measured_pace", lambda _: 1000.0)
    run = sinklens.profile(n=3, analyzers=NAMED)
    assert run.trace.manifest["experiments"] == {}
    assert "would take about" in skipped(run)["effects"]
    assert "add --verify" in str(run.causal_effects.reason)
    asked = sinklens.profile(n=3, analyzers=("primary-sinks",), verify=True)
    assert "effects" in asked.trace.manifest["experiments"]
    assert asked.causal_effects.reason is None


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "verify", lambda *_, **__: pytest.fail("it ran"))
    run = sinklens.profile(n=3, analyzers=NAMED, verify=False)
    assert "--no-verify" in skipped(run)["effects"]
    assert "--no-verify" in str(run.causal_effects.reason)


def test_nobody_reads_it_so_it_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "verify", lambda *_, **__: pytest.fail("it ran"))
    run = sinklens.profile(n=3, analyzers=("primary-sinks",))
    assert run.trace.manifest["experiments"] == {}


def test_running_out_of_memory_keeps_the_main_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise ResourceError("Out of memory after 0 prompts.", hint="Try less.")

    monkeypatch.setattr(experiments, "verify", stop)
    run = sinklens.profile(n=3, analyzers=NAMED, verify=True)
    assert run.primary_sinks.rows
    assert "Out of memory" in str(run.causal_effects.reason)


def test_the_pace_is_that_of_this_machine() -> None:
    found: list[float] = []
    real = experiments.measured_pace

    def keep(setting: Any) -> float:
        found.append(real(setting))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "measured_pace", keep)
        sinklens.profile(n=3, analyzers=NAMED)
    assert 0 < found[0] < 1
