"""`sinklens compare` on runs of a checkpoint that came with the package: table, page, order, exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sinklens.cli.main import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs that differ in prompts: 5 and 7 of them."""
    folder = tmp_path_factory.mktemp("runs")
    found = folder / "first", folder / "second"
    for seed, (n, path) in enumerate(zip((5, 7), found, strict=True)):
        assert main(["profile", "-q", "-n", str(n), "--seed", str(seed), "--out", str(path)]) == 0
    return found


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """The message of a comparison that must fail; at most four lines, nothing on stdout."""
    capsys.readouterr()
    assert main(["compare", *arguments]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    assert len(shown.err.strip().splitlines()) <= 4
    return shown.err


def test_two_runs_become_a_table_and_a_page(runs: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "comparison.html"
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 0
    head, first, second, differ, report = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["run", "verdict", "sink_rate"]
    assert first.split()[0] == "first"
    assert second.split()[0] == "second"
    assert differ.startswith("Differ  ")
    assert "inputs.n_prompts" in differ
    assert "analyzers" not in differ  # both ran with the same parameters
    assert report == f"Report  {out}"
    html = out.read_text(encoding="utf-8")
    assert "side by side: first and second" in html
    assert "The runs did not read the same prompts" in html
    assert "<bdi>inputs › n prompts</bdi></th><td><bdi>5</bdi></td><td><bdi>7</bdi></td>" in html
    assert str(runs[0].parent) not in html


def test_steps_are_the_axis(runs: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    late, early = tmp_path / "step-100", tmp_path / "step-20"
    shutil.copytree(runs[0], late)
    shutil.copytree(runs[1], early)
    out = tmp_path / "dynamics.html"
    assert main(["compare", str(late), str(early), "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "sinklens/compare/1"
    assert document["x_label"] == "training step"
    assert [(row["run"], row["x"]) for row in document["rows"]] == [("step-20", 20), ("step-100", 100)]
    assert document["differences"]["step-100"]["inputs.n_prompts"] == [7, 5]
    assert "over training step 20 to 100" in out.read_text(encoding="utf-8")


def test_the_numbers_are_those_of_the_runs(runs: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "c.html"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 2
    for path, row in zip(runs, rows, strict=True):
        run = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        summary = run["findings"]["primary-sinks"]["summary"]
        assert row["verdict"] == run["verdict"]["status"]
        for name in ("sink_rate", "share", "strongest_position"):
            assert row[name] == summary[name]
        assert row["max_ratio"] == run["findings"]["massive-activations"]["summary"]["max_ratio"]
        assert row["super_experts"] is None


def test_one_run_is_not_enough(runs: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "c.html"
    assert "at least two runs" in fails(capsys, 2, str(runs[0]), "--out", str(out))
    assert main(["compare"]) == 2
    assert not out.exists()


def test_a_folder_that_is_no_run(runs: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "c.html"
    message = fails(capsys, 3, str(runs[0]), str(tmp_path / "empty"), "--out", str(out))
    assert "not a run folder" in message
    assert not out.exists()


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_the_list_of_analyzers_is_readable(option: tuple[str, ...], capsys: Any) -> None:
    assert main(["ls", "analyzers", *option]) == 0
    shown = capsys.readouterr().out
    assert "primary-sinks" in shown
    assert "<m" not in shown
