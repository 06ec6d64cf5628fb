"""What `sinklens mitigate` refuses or says it cannot show: data, heads, recipes, and models without a sink."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sinklens as sl
from sinklens.cli.main import main
from sinklens.core.errors import SelfCheckError
from sinklens.evaluation.tasks import task_from_rows
from sinklens.models.opening import open_model
from sinklens.pipeline.mitigation_gate import require_acted
from sinklens.testbeds import uniform_control

FEW = ["mitigate", "-q", "-n", "2", "--n-items", "12"]


def fails(capsys: Any, tmp_path: Path, code: int, *arguments: str) -> str:
    assert main([*FEW, *arguments, "--out", str(tmp_path / "run")]) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return f"task:{path}"


def labelled(*labels: str, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"w{start + i} w3", "label": label} for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("zero-tuning:heads=L0H7", "there is no head 7"),
        ("act:heads=L9H0", "there is no layer 9"),
        ("knock-out:shared_heads=5", "there is no head 5"),
        ("zero-tuning:layers=4", "there is no layer 4"),
        ("zero-tuning:heads=first", "names no head"),
    ],
)
def test_unknown_heads(tmp_path: Path, capsys: Any, method: str, said: str) -> None:
    assert said in fails(capsys, tmp_path, 2, "--with", method)
    assert not (tmp_path / "run").exists()  # refused before the profile: no folder with a request alone


def test_a_folder_that_was_there_stays(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    fails(capsys, tmp_path, 2, "--with", "act:heads=L9H0")
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_one_class_cannot_show_a_gain(tmp_path: Path, capsys: Any) -> None:
    task = lines(tmp_path / "t.jsonl", labelled("w1", "w1", "w1"))
    said = fails(capsys, tmp_path, 3, "--with", "act", "--task", task)
    assert "every item has the label 'w1'" in said
    assert "could not tell a mitigation that helps from one that shifts all answers towards it" in said


def test_a_part_with_one_class_is_refused_too(tmp_path: Path, capsys: Any) -> None:
    """One item of the second class: whichever part has it, the other one has a single class."""
    task = lines(tmp_path / "t.jsonl", labelled(*["w1"] * 9, "w2"))
    said = fails(capsys, tmp_path, 3, "--with", "zero-tuning", "--calibrate", "--task", task)
    assert "every item of the " in said
    assert " split has the label 'w1'" in said
    rows = [{"prompt": f"w{i}", "answer": answer} for i, answer in enumerate(["yes"] * 5 + ["no"])]
    task = lines(tmp_path / "q.jsonl", rows)
    said = fails(capsys, tmp_path, 3, "--with", "zero-tuning", "--calibrate", "--task", task)
    assert " split has the label 'yes'" in said


def test_task_files_that_hold_nothing_are_told_as_such(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    said = fails(capsys, tmp_path, 3, "--with", "zero-tuning", "--task", f"task:{tmp_path / 'empty.jsonl'}")
    assert "The task file" in said
    assert "is empty" in said
    assert "one JSON object per line" in said
    said = fails(capsys, tmp_path, 3, "--with", "zero-tuning", "--task", f"task:{tmp_path / 'absent.jsonl'}")
    assert "The task file" in said
    assert "does not exist" in said
    assert "prompts" not in said.partition("does not exist")[2]


def test_files_that_share_a_question_are_refused(tmp_path: Path, capsys: Any) -> None:
    report = lines(tmp_path / "report.jsonl", labelled("w1", "w2", "w1", "w2"))
    copy = {"prompt": "w2  w3", "label": "w1"}  # but for a space
    shared = [*labelled("w1", "w2", start=20), copy]
    calibration = lines(tmp_path / "calibration.jsonl", shared)
    said = fails(capsys, tmp_path, 3, "--with", "zero-tuning", "--task", report, "--calibration", calibration)
    assert "1 of 4 items to report on were used for calibration" in said
    assert "report.jsonl:3" in said
    assert "--task with --calibrate" in said


def test_a_model_without_a_sink_has_nothing_to_edit(tmp_path: Path) -> None:
    opened = open_model("bundled:dense-ind")
    module: Any = opened.module
    model = uniform_control(module.config)
    words = "Cara fox apple Tina Hugo soup shell salt"
    rows = [
        {"prompt": f"{first} {words}", "choices": ["fox", "soup"], "answer": 0} for first in ("Cara", "Tina")
    ]
    run = sl.mitigate(
        model, "act", tasks=task_from_rows(rows), tokenizer=opened.tokenizer, n=2, out=tmp_path / "run",
        prompts=["Cara fox " * 20, "Tina soup " * 20],
    )  # fmt: skip
    assert run.findings["primary-sinks"].status == "not-found"
    assert run.entries[0]["verdict"]["judgement"] == "did not act"
    assert "no row had anything to edit" in run.entries[0]["verdict"]["text"]
    assert run.findings["mass-ledger"].verdict.startswith("No token is a sink")
    with pytest.raises(SelfCheckError, match="'act' edited 0 rows") as error:
        require_acted(run)
    assert error.value.exit_code == 5
    assert "no attention sink by its own profile, so there was nothing to edit" in str(error.value.detail)


def test_a_recipe_of_other_weights_is_refused(tmp_path: Path, capsys: Any) -> None:
    run = sl.mitigate("bundled:dense-ind", "knock-out", tasks="induction", n=2, n_items=6)
    recipe = run.recipes["knock-out"].save(tmp_path / "r.json")
    data = json.loads(recipe.read_text())
    data["model"]["weights"] = "0" * len(data["model"]["weights"])
    recipe.write_text(json.dumps(data))
    said = fails(capsys, tmp_path, 3, "--recipe", str(recipe))
    assert "same shape and other weights" in said
    (tmp_path / "r.json").write_text("{}")
    assert "is not a recipe of this version" in fails(capsys, tmp_path, 3, "--recipe", str(recipe))
    assert "cannot be read" in fails(capsys, tmp_path, 3, "--recipe", str(tmp_path / "none.json"))
