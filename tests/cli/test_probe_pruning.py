"""`sinklens probe pruning` as its users meet it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sinklens.cli.main import main

MODEL = ["-m", "vlm-shapes", "-n", "10", "--draws", "1", "-q"]


def test_the_document_is_what_is_printed(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "probe"
    asked = ["--with", "fastv,fastv:recency=true,divprune:sinks=kept", "--keep", "0.4", "--out", str(out)]
    assert main(["probe", "pruning", *MODEL, *asked, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((out / "probe.json").read_text(encoding="utf-8"))
    assert (document["schema"], document["probe"]) == ("sinklens/probe/1", "pruning")
    (found,) = document["results"]
    assert (found["n_prompts"], found["n_calibration"]) == (6, 4)
    assert [(row["pruner"], row["kept"]) for row in found["rows"]] == [
        ("fastv", 10),
        ("fastv:recency=true", 10),
    ]
    assert found["skipped"][0]["pruner"] == "divprune:sinks=kept"
    assert main(["probe", "pruning", *MODEL, *asked, "--force"]) == 0
    said = capsys.readouterr().out
    assert "Visual sinks are not known: " in said
    assert "divprune:sinks=kept: Not applicable: the model has no sink dims" in said
    assert "no measurable difference to random tokens" in said
    assert str(out / "probe.json") in said


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--with", "fastvv"], 2, "Unknown pruner"),
        (["--with", "fastv:recencies=true"], 2, "recency"),
        (["--with", "fastv:recency=perhaps"], 2, "must be true or false"),
        (["--with", "fastv:layer=two"], 2, "must be a whole number"),
        (["--with", "fastv:layer=9"], 2, "layers 0 to 3"),
        (["--keep", "half"], 2, "--keep takes shares"),
        (["--keep", "1.5"], 2, "share of the visual tokens"),
        (["--draws", "0"], 2, "--draws must be at least 1"),
    ],
)
def test_mistakes_are_told(arguments: list[str], code: int, told: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["probe", "pruning", *MODEL, *arguments, "--out", str(tmp_path / "probe")]) == code
    said = capsys.readouterr().err
    assert told in said
    assert "Traceback" not in said


def test_texts_have_no_tokens_to_prune(tmp_path: Path, capsys: Any) -> None:
    assert (
        main(["probe", "pruning", "-m", "dense-ind", "-n", "4", "-q", "--out", str(tmp_path / "probe")]) != 0
    )
    said = capsys.readouterr().err
    assert "picture" in said
    assert "Traceback" not in said
