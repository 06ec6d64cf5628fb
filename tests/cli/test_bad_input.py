"""Mistakes of every kind on the bundled checkpoints: one sentence, what to type next, the exit code, no traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sinklens.cli.main import main

BEDS = ("-q", "-n", "2")
CASES = [
    (("profile", "--device", "meta"), 2, "Device 'meta' cannot be used on this machine"),
    (("doctor", "--device", "meta"), 2, "--device cpu"),
    (("profile", "-m", ""), 3, "The model's name is empty."),
    (("profile", "--analyzers", ","), 2, "--analyzers names no analyzer."),
    (("mitigate", "--with", "act", "--analyzers", ""), 2, "--analyzers names no analyzer."),
    (("profile", "--question", "how many ?"), 2, "the prompts have none"),
    (("profile", "--question", "how many ?", "--dry-run"), 2, "the prompts have none"),
    (("profile", "--stream", "off", "--stream-budget", "1GB"), 2, "Leave out one of the two."),
    (("profile", "--sink-dims", "published"), 2, "the prompts have none"),
    (("profile", "--sink-dims", "3", "--dry-run"), 2, "leave it out"),
    (("profile", "--resume", "RUN"), 3, "does not say what the run was asked to do"),
    (("profile", "--resume", "RUN", "--fail-if", "verdict.status == sink"), 3, "does not say"),
    (("profile", "--fail-if", "verdict.status > 3"), 2, "Compare it with == or !=."),
    (("profile", "--fail-if", "verdict.text > 3"), 2, "Compare it with == or !=."),
    (("probe", "pruning", "-m", "nowhere/x", "--keep", "2"), 2, "above 0 and below 1"),
    (("probe", "pruning", "-m", "nowhere/x", "--keep", ","), 2, "above 0 and below 1"),
    (("mitigate", "--with", "act", "--search", "keep=better"), 2, "Choose them with --calibrate"),
    (("mitigate", "--with", "act", "--calibrate", "--search", "share=0.5"), 2, "There are: keep."),
    (("mitigate", "--with", "act", "--calibrate", "--search", "keep=all"), 2, "keep must be better"),
    (
        ("mitigate", "--with", "zero-tuning", "--calibrate", "--search", "share=x"),
        2,
        "share must be a number",
    ),
    (
        ("mitigate", "--with", "zero-tuning", "--calibrate", "--search", "objective=x"),
        2,
        "or unsupervised, got 'x'",
    ),
    (("mitigate", "--with", "knock-out", "--calibrate", "--search", "keep=better"), 2, "--search"),
]


@pytest.mark.parametrize(("arguments", "code", "says"), CASES, ids=[" ".join(case[0]) for case in CASES])
def test_told_in_words(arguments: tuple[str, ...], code: int, says: str, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "manifest.json").write_text('{"schema": "sinklens/run/1", "request": {"model": "m"}}')
    given = [str(run) if argument == "RUN" else argument for argument in arguments]
    few = () if "--resume" in given or "doctor" in given else BEDS
    out = () if "--resume" in given or "doctor" in given else ("--out", str(tmp_path / "out"))
    assert main([*given, *few, *out]) == code
    said = capsys.readouterr().err
    assert says in said
    assert "bug in sinklens" not in said
    assert "Traceback" not in said
