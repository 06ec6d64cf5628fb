"""`sinklens mitigate --dry-run`: the plan of a run, against the run itself, without its weights."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sinklens.cli.main import main
from sinklens.pipeline import mitigate as job
from sinklens.tracers import batch as batches

ASKED = ["-m", "moe-ind", "-n", "4", "--n-items", "20", "--task", "ppl", "--controls", "1"]


def plan(capsys: Any, *arguments: str) -> dict[str, Any]:
    assert main(["mitigate", *arguments, "--dry-run", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_plan_is_that_of_the_run(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    methods = ["--with", "expert-pruning,zero-tuning", "--calibrate"]
    found = plan(capsys, *ASKED, *methods)
    assert found["schema"] == "sinklens/plan/1"
    pruning, tuning = found["mitigations"]
    assert (pruning["open"], pruning["controls"], pruning["calibration"]) == ("Super Experts", 2, 0)
    assert (tuning["open"], tuning["controls"]) == ("", 0)
    parts = [found["unchanged"], pruning, tuning]
    for key in ("passes", "tokens", "seconds"):
        assert found["prediction"][key] == pytest.approx(sum(part[key] for part in parts))
    assert not (tmp_path / "runs").exists()

    began, out = time.perf_counter(), tmp_path / "run"
    assert main(["mitigate", *ASKED, *methods, "-q", "--json", "--out", str(out)]) == 0
    took = time.perf_counter() - began
    run = json.loads(capsys.readouterr().out)
    made = run["manifest"]["mitigation"]
    assert found["tasks"][0]["items"] == made["tasks"][0]["report"]["n"]
    assert found["calibration"]["items"] == made["calibration"]["n"]
    assert [e["label"] for e in run["mitigations"]] == [step["label"] for step in found["mitigations"]]
    calibration = run["mitigations"][1]["calibration"]
    assert calibration["passes"] <= tuning["calibration"]
    assert calibration["tokens"] == found["calibration"]["tokens"]
    assert sum(len(e["controls"]) for e in run["mitigations"]) == pruning["controls"]
    assert found["inputs"]["sha256"] == run["manifest"]["inputs"]["sha256"]
    stored = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    assert found["prediction"]["disk"] == pytest.approx(stored, rel=0.5)
    assert found["prediction"]["seconds"] < 20 * took


def test_no_weights_are_loaded(capsys: Any, monkeypatch: Any) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr("sinklens.models.loading.load_model", refused, raising=False)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", refused)
    monkeypatch.setattr("safetensors.torch.load_file", refused)
    monkeypatch.setattr(batches, "forward", refused)
    monkeypatch.setattr(job, "prepare", refused)
    found = plan(capsys, *ASKED, "--with", "fake-quantisation:weights=4:protect=found,act,knock-out")
    alone = plan(capsys, *ASKED, "--with", "knock-out")
    assert (
        found["prediction"]["weights"] == 2 * alone["prediction"]["weights"]
    )  # the rounded ones beside their own
    assert found["mitigations"][0]["controls"] == 1
    assert {"expert_max", "residual_top"} <= set(found["prediction"]["signals"])
    assert "expert_max" not in alone["prediction"]["signals"]


def test_plans_in_words(capsys: Any) -> None:
    asked = [*ASKED, "--with", "expert-pruning,massive-activations"]
    assert main(["mitigate", *asked, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "Mitigation  expert-pruning:experts=found · Super Experts of the run · 2 controls" in said
    assert "Task        perplexity: 20 items to report" in said
    assert "free: fits" in said
    assert main(["mitigate", *asked, "--dry-run", "--device", "cuda"]) == 0
    assert "not predicted for this device" in capsys.readouterr().out
    assert main(["mitigate", "-m", "vlm-shapes", "-n", "2", "--with", "var", "--dry-run"]) == 0
    assert "sink dims of the run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["-m", "dense-ind", "--with", "expert-pruning"], 3, "this model has no experts"),
        (["--with", "zero-tuning:heads=L9H0"], 2, "no layer 9"),
        (["--with", "fake-quantisation:protect-dims=99"], 2, "there is no dim 99"),
        (["--with", "act", "--task", "nothing"], 2, "Unknown task"),
        (["--with", "act", "--task", "ppl", "--calibrate", "--calibration", "ppl"], 3, "used for calibration"),
        (["--resume", "nowhere"], 2, "--dry-run would be ignored"),
    ],
)  # fmt: skip
def test_what_the_run_would_refuse_is_told_before_it(
    capsys: Any, arguments: list[str], code: int, said: str
) -> None:
    assert main(["mitigate", *arguments, "--dry-run"]) == code
    assert said in capsys.readouterr().err
