"""Which experiments run after the main pass, and what is said of those that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sinklens
from sinklens.analyzers import HeadClasses, MassiveActivations, PrimarySinks, registry
from sinklens.cli.main import main
from sinklens.core.errors import DataError, ResourceError
from sinklens.inputs.spec import Prompt, PromptSet
from sinklens.pipeline import experiments
from sinklens.pipeline.options import ProfileOptions
from sinklens.pipeline.plan import predict
from sinklens.pipeline.prepare import refuse_short

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


def test_stopping_an_experiment_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    out = tmp_path / "run"
    monkeypatch.setattr(experiments, "verify", stop)
    command = ["profile", "-q", "-n", "3", "--analyzers", ",".join(NAMED), "--verify"]
    assert main([*command, "--out", str(out)]) == 130
    assert "3/3 prompts saved" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["profile", "-q", "--resume", str(out)]) == 0
    run = sinklens.load(out)
    assert isinstance(run, sinklens.Run)
    assert run.causal_effects.reason is None


def test_conditions_reach_every_finding(tmp_path: Path, capsys: Any) -> None:
    named = ["profile", "-q", "-n", "3", "--analyzers", "all", "--no-verify"]
    assert main([*named, "--out", str(tmp_path / "first")]) == 0
    run = sinklens.load(tmp_path / "first")
    assert isinstance(run, sinklens.Run)
    status = {name: one.status for name, one in run.findings.items()}
    assert status.keys() >= {name for name, cls in registry.items() if not cls.of_pictures}
    never = {name: "not-found" if one == "found" else "found" for name, one in status.items()}
    asked = [part for name, word in never.items() for part in ("--fail-if", f"{name}.status == {word}")]
    assert main([*named, *asked, "--out", str(tmp_path / "a")]) == 0
    capsys.readouterr()
    gate = ["--fail-if", "super-experts.n_found > 0"]
    assert main([*named, *gate, "--out", str(tmp_path / "b")]) == 2
    said = capsys.readouterr().err
    assert "does not apply" in said
    assert "super-experts.status" in said
    assert main([*named, "--fail-if", "writers.rows > 0", "--out", str(tmp_path / "c")]) == 6
    assert main([*named, "--fail-if", "visual-sinks.n_sinks > 0", "--out", str(tmp_path / "d")]) == 2
    assert "visual-sinks took no part" in capsys.readouterr().err


def test_prompts_may_be_too_short_for_some_analyzers_but_not_for_one_that_is_named() -> None:
    short = [[1, *range(5, 55)], [1, *range(9, 59)]]
    run = sinklens.profile("bundled:dense-ind", prompts=short, verify=False)
    assert run.head_classes.reason is not None
    assert "64 tokens" in run.head_classes.reason
    assert run.primary_sinks.reason is None
    with pytest.raises(DataError, match="at least 64 tokens"):
        sinklens.profile("bundled:dense-ind", prompts=short, analyzers=("head-classes",))
    for named in (("primary-sinks",), ("all", "primary-sinks"), "mean-maps,primary-sinks"):
        with pytest.raises(
            DataError, match="primary-sinks needs prompts of at least 32 tokens; the longest has 16"
        ):
            sinklens.profile("bundled:dense-ind", prompts=[[1, *range(5, 20)]], analyzers=named)


@pytest.mark.parametrize("length", [1, 2, 12, 31])
@pytest.mark.parametrize("asked", [(), ("all",)])
def test_short_prompts_end_no_run_whose_analyzers_were_not_named(
    length: int, asked: tuple[str, ...], tmp_path: Path
) -> None:
    prompts = [[1, *range(5, 4 + length)], [1, *range(9, 8 + max(1, length - 5))]]
    run = sinklens.profile("bundled:moe-ind", prompts=prompts, analyzers=asked, sensitivity=True, verify=True)
    why = f"sink rates need prompts of at least 32 tokens; the longest has {length}."
    assert run.primary_sinks.reason == why
    assert run.document["verdict"]["status"] == "unknown"
    assert why in run.document["verdict"]["text"]
    assert run.massive_activations.reason is None
    assert run.sensitivity.reason == why[0].upper() + why[1:]
    if asked:
        assert (run.bos_alignment.reason is None) == (length > 1)
    assert "at least 32 tokens" in run.report(tmp_path / "report.html").read_text(encoding="utf-8")


def test_prompts_too_short_for_every_analyzer_are_refused() -> None:
    prompts = PromptSet((Prompt(0, (1,) * 20, ("a",) * 20, "made"),))
    both = (PrimarySinks(), HeadClasses())
    with pytest.raises(
        DataError, match="primary-sinks needs prompts of at least 32 tokens; the longest has 20"
    ):
        refuse_short(ProfileOptions(), both, prompts)
    refuse_short(ProfileOptions(), (*both, MassiveActivations()), prompts)


def test_a_dry_run_knows_how_much_will_be_stored() -> None:
    options = ProfileOptions(n=5, analyzers=("all",))
    predicted = predict("bundled:moe-ind", options)[2]
    run = sinklens.profile("bundled:moe-ind", n=5, analyzers=("all",), verify=False)
    stored = sum(array.nbytes for record in run.trace for array in record.arrays.values())
    assert 0.95 * stored <= predicted.disk <= 1.2 * stored
    kinds = {record_name for record in run.trace for record_name in record.arrays}
    # This model has no learned sinks, and no down projection beside those of its experts.
    assert set(predicted.signals) - kinds <= {"learned_sink_mass", "down_proj_top"}


def test_a_dry_run_knows_how_much_pictures_will_store() -> None:
    options = ProfileOptions(n=6, analyzers=("all",))
    predicted = predict("bundled:vlm-shapes", options)[2]
    run = sinklens.profile("bundled:vlm-shapes", n=6, analyzers=("all",), verify=False)
    stored = sum(
        array.nbytes
        for record in run.trace
        for name, array in record.arrays.items()
        if not name.startswith("thumbnail")
    )
    assert 0.9 * stored <= predicted.disk <= 1.4 * stored
