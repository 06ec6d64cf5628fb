"""`cite`: exactly what was run, and nothing that was not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import sinklens
from sinklens.cli.main import main
from sinklens.pipeline.cite import software_entry


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cite") / "run"
    analyzers = ("primary-sinks:epsilon=0.25", "massive-activations", "super-experts")
    sinklens.profile(n=5, analyzers=analyzers, verify=False, out=path)
    return path


def test_bibtex_has_the_methods_that_applied(folder: Path, capsys: Any) -> None:
    assert main(["cite", str(folder)]) == 0
    shown = capsys.readouterr().out
    keys = re.findall(r"^@(\w+)\{([\w-]+),$", shown, flags=re.MULTILINE)
    # A dense model has no Super Experts, so their paper was not used.
    assert keys == [("article", "gu2024when"), ("article", "sun2024massive"), ("software", "sinklens")]
    assert shown.count("{") == shown.count("}")
    assert f"version = {{{sinklens.__version__}}}" in shown


def test_the_methods_paragraph_names_what_was_run(folder: Path, capsys: Any) -> None:
    assert main(["cite", str(folder), "--style", "methods"]) == 0
    shown = capsys.readouterr().out
    assert "bundled:dense-ind" in shown
    assert "5 prompts" in shown
    assert "epsilon = 0.25" in shown
    assert "Super Experts" not in shown
    assert "experiments" not in shown
    assert len(shown.splitlines()) == 1


def test_experiments_are_part_of_the_methods(tmp_path: Path, capsys: Any) -> None:
    run = sinklens.profile(n=3, seed=11, analyzers=("primary-sinks",), verify=True, out=tmp_path / "run")
    assert run.findings
    assert main(["cite", str(tmp_path / "run"), "--style", "methods"]) == 0
    assert "Causes were removed" in (shown := capsys.readouterr().out)
    assert "(seed 11)" in shown


def test_the_program_is_cited_as_it_ran() -> None:
    manifest = {
        "sinklens": {"version": "0.7.1", "commit": "0123456789abcdef0123", "modified": True},
        "time": {"start_utc": "2031-02-03T00:00:00Z"},
    }
    entry = software_entry(manifest)
    assert "version = {0.7.1}" in entry
    assert "note    = {commit 0123456789ab with changes}" in entry
    assert "year    = {2031}" in entry
    assert "note" not in software_entry({"sinklens": {"version": "0.7.1", "commit": None}})


def test_another_style_and_no_run(folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["cite", str(folder), "--style", "apa"]) == 2
    assert "bibtex, methods" in capsys.readouterr().err
    assert main(["cite", str(tmp_path)]) == 3
