"""`torchrun -m sinklens profile`: the same findings as one process, one voice, and no waiting for the dead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sinklens.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("-n", "7", "--batch-size", "2", "--no-verify", "--analyzers", "primary-sinks,massive-activations")


def torchrun(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Start several processes, with as many threads each as this one has."""
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=ROOT)


def told(done: subprocess.CompletedProcess[str], word: str) -> list[str]:
    return [line for line in done.stderr.splitlines() if word in line]


def same_arrays(one: Path, other: Path) -> bool:
    found, expected = (load_file(folder / "arrays.safetensors") for folder in (one, other))
    return found.keys() == expected.keys() and all(
        torch.equal(found[name].nan_to_num(-7), expected[name].nan_to_num(-7)) for name in expected
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: Any) -> Path:
    """A run by one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main(["profile", "-q", "--out", str(folder), *OPTIONS]) == 0
    return folder


def test_two_processes_find_what_one_finds_bit_for_bit(alone: Path, tmp_path: Path) -> None:
    done = torchrun("-m", "sinklens", "profile", "--json", "--out", str(tmp_path / "run"), *OPTIONS)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)  # one document, from one process
    expected = json.loads((alone / "summary.json").read_text(encoding="utf-8"))
    for part in ("model", "verdict", "checks", "findings"):
        assert document[part] == expected[part]
    assert document["manifest"]["processes"] == {"count": 2, "transport": "gloo"}
    assert same_arrays(tmp_path / "run", alone)
    assert len(told(done, "Self-check")) == 1
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"report.html", "manifest.json"} <= names
    assert "shards" not in names


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_killed_process_is_named_and_the_run_goes_on_with_another_number(
    victim: str, alone: Path, tmp_path: Path, capsys: Any
) -> None:
    script, folder = str(Path(__file__).with_name("one_dies.py")), tmp_path / "run"
    done = torchrun(script, "kill", victim, "profile", "--out", str(folder), *OPTIONS)
    assert done.returncode != 0
    assert told(done, "ended without a word") == [f"Process {victim} of 2 ended without a word."]
    (saved,) = told(done, "prompts saved")
    assert saved.endswith("/7 prompts saved.")
    assert told(done, f"profile --resume {folder}")
    assert list((folder / "shards").glob("*.safetensors"))
    if victim == "0":
        assert main(["profile", "-q", "--resume", str(folder)]) == 0
    else:
        again = torchrun("-m", "sinklens", "profile", "-q", "--resume", str(folder), processes=3)
        assert again.returncode == 0, again.stderr
    assert same_arrays(folder, alone)


@pytest.mark.slow
def test_ctrl_c_is_answered_once_and_keeps_what_is_finished(tmp_path: Path) -> None:
    script, folder = str(Path(__file__).with_name("one_dies.py")), tmp_path / "run"
    done = torchrun(script, "stop", "0", "profile", "--out", str(folder), *OPTIONS)
    assert done.returncode != 0
    (line,) = told(done, "prompts saved")
    assert line.startswith("Stopped. ")
    assert list((folder / "shards").glob("*.safetensors"))


@pytest.mark.slow
def test_a_mistake_is_told_once(tmp_path: Path) -> None:
    done = torchrun(
        "-m", "sinklens", "profile", "-m", str(tmp_path / "nothing"), "--out", str(tmp_path / "run")
    )
    assert done.returncode != 0
    assert len(told(done, "nothing")) == 1
    assert not (tmp_path / "run").exists()


def test_other_commands_are_refused_beside_torchrun(monkeypatch: Any, capsys: Any) -> None:
    given = {
        "RANK": "0",
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
        "LOCAL_RANK": "0",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main(["mitigate", "-m", "x"]) == 2
    said = capsys.readouterr().err
    assert "`sinklens mitigate` runs in one process; torchrun started 3." in said
    assert "Start it without torchrun: sinklens mitigate -m x" in said
    monkeypatch.setenv("RANK", "1")
    assert main(["mitigate", "-m", "x"]) == 2
    assert capsys.readouterr().err == ""
