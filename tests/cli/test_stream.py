"""`--stream` on the command line: the plan, the run, the exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sinklens.cli.main import main

FEW = ("-n", "3", "--seq-len", "32", "--no-verify")


def test_the_plan_says_what_streaming_takes(capsys: Any) -> None:
    assert main(["profile", "--stream", "on", "--stream-budget", "1kB", "--dry-run", *FEW]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("Stream"))
    assert "asked for" in line
    assert "of states between blocks" in line
    assert "of what blocks show" in line
    assert "of both on disk" in line
    assert main(["profile", "--stream", "off", "--dry-run", "--json", *FEW]) == 0
    assert json.loads(capsys.readouterr().out)["prediction"]["stream"] is None


def test_a_streamed_run_finds_what_the_other_does(tmp_path: Path, capsys: Any) -> None:
    documents = []
    for how in ("on", "off"):
        assert main(["profile", "--stream", how, "--json", "-q", "--out", str(tmp_path / how), *FEW]) == 0
        documents.append(json.loads(capsys.readouterr().out))
    streamed, whole = documents
    assert streamed["findings"] == whole["findings"]
    assert streamed["verdict"] == whole["verdict"]
    stream = streamed["manifest"]["stream"]
    assert stream["bytes_read"] == stream["bytes_stored"]
    assert "stream" not in whole["manifest"]
    assert not (tmp_path / "on" / "streaming").exists()


def test_refusals(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def says(code: int, *arguments: str) -> str:
        assert main(["profile", "-q", "--out", str(tmp_path / "run"), *FEW, *arguments]) == code
        return capsys.readouterr().err

    assert "auto, on or off" in says(2, "--stream", "maybe")
    assert "--stream-budget 2GB" in says(2, "--stream-budget", "plenty")
    assert "a device map decides" in says(2, "--stream", "on", "--device-map", "auto")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    message = says(4, "--stream", "on")
    assert "disk" in message
    assert "Traceback" not in message
