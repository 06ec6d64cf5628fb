"""How far a run is, in a real kernel: one output that is rewritten in place, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from sinklens.pipeline import watched
from sinklens.pipeline.listener import Silent

HERE = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
QUICK = "n=3, analyzers=('primary-sinks',), verify=False"
CELLS = (
    f"import sinklens as sl\nrun = sl.profile('bundled:dense-ind', {QUICK})",
    f"print('mine')\nrun = sl.profile('bundled:dense-ind', {QUICK})\nprint('too')",
    f"run = sl.profile('bundled:dense-ind', {QUICK}, progress=False)",
    "run = sl.profile('bundled:dense-ind', n=2, analyzers=('primary-sinks', 'writers'))",
    f"try:\n    sl.mitigate('bundled:dense-ind', 'act:heads=L9H0', {QUICK})\nexcept Exception: pass",
    f"found = sl.mitigate('bundled:dense-ind', 'knock-out', n_items=4, {QUICK})",
)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    place = {"metadata": {"path": str(tmp_path_factory.mktemp("kernel"))}}
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources=place)
    client.execute(env=HERE)
    return [cell.outputs for cell in notebook.cells]


def lines(found: list[Any]) -> list[str]:
    assert all(output.metadata == watched.MARK for output in found if output.output_type == "display_data")
    return [output.text if output.output_type == "stream" else output.data["text/plain"] for output in found]


@pytest.mark.slow
def test_one_line_stays(outputs: list[list[Any]]) -> None:
    assert lines(outputs[0]) == ["bundled:dense-ind: done, 3 prompts"]
    assert "<progress" not in outputs[0][0].data["text/html"]
    assert lines(outputs[1]) == ["mine\n", "bundled:dense-ind: done, 3 prompts", "too\n"]
    assert lines(outputs[3]) == ["bundled:dense-ind: done, 2 prompts"]
    assert lines(outputs[5]) == ["bundled:dense-ind: done, 3 prompts"]


@pytest.mark.slow
def test_it_can_be_switched_off(outputs: list[list[Any]]) -> None:
    assert outputs[2] == []


@pytest.mark.slow
def test_a_failure_leaves_where_it_was(outputs: list[list[Any]]) -> None:
    (line,) = lines(outputs[4])
    assert line == "bundled:dense-ind: stopped, at: Profiling"


@pytest.mark.slow
def test_plain_python_is_silent(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CELLS[0]],
        cwd=tmp_path,
        env=HERE,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class Handle:
    def __init__(self) -> None:
        self.shown: list[Any] = []

    def update(self, data: Any, **rest: Any) -> None:
        self.shown.append(data)


def test_what_the_line_says_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("IPython")
    handle = Handle()

    def display(data: Any, **rest: Any) -> Handle:
        assert rest["display_id"] is True
        handle.update(data)
        return handle

    monkeypatch.setattr("IPython.display.display", display)
    line = watched.NotebookLine()
    line.stage("effects")
    for done in range(1, 1001):
        line.progress(done, 1000)
    line.stage("<script>" + "x" * 500)
    line.end("done")
    said = [data["text/plain"] for data in handle.shown]
    assert said[0] == "Opening the model"
    assert said[1].startswith("Verify what the model does")
    assert "1000 of 1000" in said[-3]
    assert '<progress value="1000" max="1000">' in handle.shown[-3]["text/html"]
    assert len(said) < 60  # not one drawing per step
    assert all("<script" not in data["text/html"] and len(data["text/html"]) < 1000 for data in handle.shown)


def test_outside_of_a_notebook_nobody_listens() -> None:
    assert not watched.in_notebook()
    with watched.watched(None) as heard:
        assert isinstance(heard, Silent)
    mine = Silent()
    with watched.watched(mine) as heard:
        assert heard is mine
