"""Backends on the command line: lists, `doctor`, misspelt names, and what is not imported."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from sinklens.cli.main import main
from sinklens.tracers.signals import ALL_SIGNALS

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_list_tells_what_is_there_and_how_much_it_gives(capsys: Any) -> None:
    assert main(["ls", "backends", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["backends"]}
    assert list(rows) == ["hf", "transformer-lens", "nnsight", "ndif"]
    assert rows["hf"]["signals"] == rows["nnsight"]["signals"] == f"{len(ALL_SIGNALS)} of {len(ALL_SIGNALS)}"
    assert int(rows["ndif"]["signals"].split()[0]) < len(ALL_SIGNALS) / 2
    assert rows["transformer-lens"]["installed"].startswith("4.")


def test_a_library_that_is_missing_is_listed_with_what_to_install(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("sinklens.tracers.backends.base.find_spec", lambda name: None)
    assert main(["ls", "backends"]) == 0
    assert "no: pip install 'sinklens[nnsight]'" in capsys.readouterr().out
    assert main(["profile", "-q", "--backend", "nnsight"]) == 3
    assert "pip install 'sinklens[nnsight]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["hf", "transformer-lens", "nnsight"])
def test_doctor_names_the_backend_and_passes(name: str, capsys: Any) -> None:
    assert main(["doctor", "--backend", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backend"]["name"] == name
    assert found["backend"]["signals"] == found["backend"]["of"] == len(ALL_SIGNALS)
    assert all(check["passed"] for check in found["checks"])
    assert main(["doctor", "--backend", name]) == 0
    assert f"{name} (" in capsys.readouterr().out.splitlines()[0]


def test_misspelt_and_contradicting_names_are_explained(capsys: Any) -> None:
    assert main(["profile", "-q", "--backend", "transformerlens"]) == 2
    assert "Did you mean 'transformer-lens'?" in capsys.readouterr().err
    assert main(["profile", "-q", "--backend", "hf", "--remote"]) == 2
    assert "--remote runs through nnsight" in capsys.readouterr().err


def test_a_saved_run_remembers_its_backend(tmp_path: Any, capsys: Any) -> None:
    out = tmp_path / "run"
    names = ["--analyzers", "primary-sinks", "-n", "2", "--seq-len", "48", "--no-verify"]
    assert main(["profile", "-q", "--backend", "nnsight", "--out", str(out), "--json", *names]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["manifest"]["tracing"]["backend"] == "nnsight"
    assert main(["profile", "-q", "--resume", str(out)]) == 0


def test_neither_library_is_imported_unless_it_runs_a_model() -> None:
    code = (
        "import sys, sinklens\n"
        "from sinklens.tracers.backends import backends, open_with, owner_of\n"
        "from sinklens.pipeline.backends import backend_rows, capability_rows\n"
        "backend_rows(), capability_rows()\n"
        "opened = open_with(None)\n"
        "assert owner_of(opened.module).name == 'hf'\n"
        "loaded = {'transformer_lens', 'nnsight'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]
