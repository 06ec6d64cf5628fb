"""`sinklens testbed` and a profile of what it plants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sinklens
from sinklens.cli.main import main


def test_list_names_what_emerged_and_what_is_planted(capsys: Any) -> None:
    assert main(["testbed", "list", "--json"]) == 0
    beds = {bed["name"]: bed for bed in json.loads(capsys.readouterr().out)["testbeds"]}
    assert beds["dense-ind"]["kind"] == "trained"
    assert beds["dense-ind"]["bundled"]
    assert beds["planted-llama"]["kind"] == "planted"


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma2", "gpt2"])
def test_a_planted_testbed_is_profiled_to_its_answer_key(family: str, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "planted"
    assert main(["testbed", "plant", family, "--seed", "3", "--out", str(folder)]) == 0
    truth = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
    run = sinklens.profile(str(folder), n=12)
    found = {(layer, head) for layer, head, _ in run.primary_sinks.summary["heads"]}
    assert found == {(head["layer"], head["head"]) for head in truth["heads"]}
    assert [row["position"] for row in run.primary_sinks.rows] == [0]
    assert {row["dim"] for row in run.massive_activations.rows} == {item["dim"] for item in truth["massive"]}
    experts = [[row["layer"], row["expert"]] for row in run.super_experts.rows]
    assert experts == truth["super_experts"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["plant", "bert"], 2, "bert"),
        (["train", "dense-inde"], 2, "dense-ind"),
        (["train", "dense-ind", "--steps", "10,x"], 2, "numbers"),
        (["train", "dense-ind", "--steps", "999999"], 2, "999999"),
    ],
)
def test_bad_requests(arguments: list[str], code: int, says: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["testbed", *arguments, "--out", str(tmp_path / "bed")]) == code
    message = capsys.readouterr().err
    assert says in message
    assert "Traceback" not in message


def test_a_folder_with_a_model_is_not_overwritten(tmp_path: Path, capsys: Any) -> None:
    assert main(["testbed", "plant", "llama", "--out", str(tmp_path / "bed")]) == 0
    assert main(["testbed", "plant", "llama", "--out", str(tmp_path / "bed")]) == 2
    assert "holds a model already" in capsys.readouterr().err
