"""`sinklens mitigate` as its users meet it: verdicts, exit codes, recipes, resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sinklens as sl
from sinklens.cli.main import main
from sinklens.pipeline import mitigation_stages as pipeline
from sinklens.pipeline.mitigation_run import MitigationRun

FAST = ["-q", "-n", "4", "--n-items", "60"]


def fails(capsys: Any, code: int, *arguments: str) -> str:
    assert main(["mitigate", *FAST, *arguments]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    said = "\n".join(line for line in lines if "Loading weights" not in line)
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 4, said
    return said


def test_calibrate_judge_report_and_load(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    code = main(
        [
            "mitigate",
            *FAST,
            "--with",
            "zero-tuning,knock-out:positions=0",
            "--calibrate",
            "--json",
            "--out",
            str(out),
        ]
    )
    document = json.loads(capsys.readouterr().out)
    assert code == 0
    assert document["schema"] == "sinklens/run/1"
    assert document["verdict"]["status"] == "sink"
    assert {row["metric"] for row in document["evaluation"]} >= {"accuracy", "log_probability"}
    row = document["evaluation"][0]
    wanted = {
        "task",
        "metric",
        "baseline",
        "mitigated",
        "delta",
        "ci_low",
        "ci_high",
        "p_value",
        "n",
        "effect",
    }
    assert wanted <= set(row)
    assert row["effect"]["rows_edited"] > 0
    knocked = next(e for e in document["mitigations"] if e["name"] == "knock-out")
    before = document["findings"]["primary-sinks"]["summary"]["sink_rate"]
    assert knocked["findings"]["primary-sinks"]["summary"]["sink_rate"] < before
    loaded = sl.load(out)
    assert isinstance(loaded, MitigationRun)
    assert list(loaded.evaluation.to_frame()["metric"]) == [r["metric"] for r in document["evaluation"]]
    assert loaded.document["mitigations"] == document["mitigations"]
    assert "knock-out" in loaded._repr_html_()
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count('id="mitigations"') == 1
    assert "mitigations--sink-map-unchanged" in page
    split = document["manifest"]["mitigation"]
    assert split["calibration"]["n"] + split["tasks"][0]["report"]["n"] <= 60
    assert (
        main(["compare", str(out), str(out / "after" / "knock-out"), "--out", str(tmp_path / "c.html")]) == 0
    )


def test_what_edits_nothing_is_no_neutral_result(tmp_path: Path, capsys: Any) -> None:
    said = fails(capsys, 5, "--with", "act:threshold=0.999", "--out", str(tmp_path / "run"))
    assert said.startswith("Mitigation 'act' edited 0 rows")
    assert "Not reported as neutral" in said
    document = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert document["evaluation"] == []
    assert document["mitigations"][0]["verdict"]["judgement"] == "did not act"


def test_a_recipe_goes_back_on_its_model_and_its_items_are_not_reported(tmp_path: Path, capsys: Any) -> None:
    opened_task = ["--task", "induction"]
    run = sl.mitigate(
        "bundled:dense-ind",
        "knock-out",
        tasks="induction",
        n=4,
        n_items=40,
    )
    recipe = run.recipes["knock-out"].save(tmp_path / "r.json")
    out = str(tmp_path / "a")
    assert main(["mitigate", *FAST, "--recipe", str(recipe), *opened_task, "--out", out]) == 0
    said = fails(capsys, 3, "-m", "moe-ind", "--recipe", str(recipe), "--out", str(tmp_path / "b"))
    assert "chosen for bundled:dense-ind" in said
    data = json.loads(recipe.read_text())
    from sinklens.evaluation.tasks import read_task
    from sinklens.models.opening import open_model

    items = read_task("induction", open_model("bundled:dense-ind"), n=60).items[:3]
    recipe.write_text(json.dumps({**data, "calibration": {"items": [item.digest for item in items]}}))
    said = fails(capsys, 3, "--recipe", str(recipe), *opened_task, "--out", str(tmp_path / "c"))
    assert "were used for calibration" in said
    assert "induction#0, induction#1, induction#2" in said


def test_an_interrupted_run_keeps_what_is_judged(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    out = tmp_path / "run"
    real, calls = pipeline.ask_under, []

    def stops(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(pipeline, "ask_under", stops)
    methods = ["--with", "knock-out,zero-tuning"]
    said = fails(capsys, 130, *methods, "--out", str(out))
    assert "1 of 2 mitigations is judged and saved" in said
    assert [e["label"] for e in json.loads((out / "summary.json").read_text())["mitigations"]] == [
        "knock-out"
    ]
    monkeypatch.setattr(pipeline, "ask_under", lambda *a: (calls.append(1), real(*a))[1])
    assert main(["mitigate", "-q", "--resume", str(out)]) == 0
    assert len(calls) == 3  # the first one was not asked again
    labels = [e["label"] for e in json.loads((out / "summary.json").read_text())["mitigations"]]
    assert labels == ["knock-out", "zero-tuning"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--with", "zero-tunin"], 2, "Did you mean 'zero-tuning'"),
        (["--with", "zero-tuning:heads=L9H0"], 2, "no layer 9"),
        (["--with", "act", "--task", "inducton"], 2, "Did you mean 'induction'"),
        (["--with", "act", "--task", "shapes-captions"], 3, "made for bundled:vlm-shapes"),
        ([], 2, "No mitigation was named"),
        (["--with", "act", "--calibrate", "--calibration", "induction"], 3, "were used for calibration"),
        (["--with", "zero-tuning", "--calibrate", "--search", "objectiv=x"], 2, "Did you mean 'objective'"),
        (["--with", "act", "--resume", "nowhere"], 2, "would be ignored"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, capsys: Any, arguments: list[str], code: int, said: str) -> None:
    extra = [] if "--resume" in arguments else ["--out", str(tmp_path / "x")]
    assert said in fails(capsys, code, *arguments, *extra)


def test_one_class_is_refused(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "a", "label": "x"}\n{"prompt": "b", "label": "x"}\n')
    said = fails(capsys, 3, "--with", "act", "--task", f"task:{path}", "--out", str(tmp_path / "x"))
    assert "every item has the label 'x'" in said


def test_conditions_hold_for_mitigations(tmp_path: Path, capsys: Any) -> None:
    said = fails(
        capsys, 6, "--with", "knock-out", "--fail-if", "knock-out.kl_mean > 0", "--out", str(tmp_path / "x")
    )
    assert "knock-out.kl_mean" in said


def test_lists_name_methods_and_tasks(capsys: Any) -> None:
    assert main(["ls", "mitigations"]) == 0
    assert "zero-tuning" in capsys.readouterr().out
    assert main(["ls", "tasks", "--json"]) == 0
    assert "induction" in capsys.readouterr().out
