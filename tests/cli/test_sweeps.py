"""A sweep over revisions is run folders of their own, set side by side by `compare`; one that moves is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sinklens.models.catalog import bundled, default_model

COMMITS = ("a" * 40, "b" * 40)
ASKED = ("-q", "-n", "4", "--no-verify", "--analyzers", "primary-sinks,massive-activations")
STOPPED = """
import sys
from sinklens.cli.main import main
from sinklens.tracers.store import RunStore
def finish(*_): raise KeyboardInterrupt
RunStore.finish = finish
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A hub's cache with two revisions of one model, `step-1` and `step-2`; `main` is the first."""
    repo = tmp_path / "hub" / "models--lab--model"
    (repo / "refs").mkdir(parents=True)
    for place, commit in enumerate(COMMITS):
        folder = repo / "snapshots" / commit
        shutil.copytree(bundled()[default_model().partition(":")[2]], folder)
        weights = load_file(folder / "model.safetensors")
        changed = {key: value * (1 - 0.05 * place) for key, value in weights.items()}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        (repo / "refs" / f"step-{place + 1}").write_text(commit)
    (repo / "refs" / "main").write_text(COMMITS[0])
    return repo.parent


def run(hub: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.mark.slow
def test_revisions_are_profiled_apart_and_compared(hub: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "runs" / f"step-{step}" for step in (1, 2)]
    for step, folder in zip((1, 2), folders, strict=True):
        done = run(
            hub, "-m", "sinklens", "profile", "-m", f"lab/model@step-{step}", "--out", str(folder), *ASKED
        )
        assert done.returncode == 0, done.stderr
    page = tmp_path / "comparison.html"
    done = run(hub, "-m", "sinklens", "compare", *map(str, folders), "--json", "--out", str(page))
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [row["run"] for row in document["rows"]] == ["step-1", "step-2"]
    assert document["x_label"] == "training step"
    assert document["rows"][0]["share"] != document["rows"][1]["share"]
    assert document["differences"]["step-2"]["model.revision"] == list(COMMITS)
    assert page.is_file()


@pytest.mark.slow
def test_a_run_is_not_resumed_with_another_revision_and_both_are_named(hub: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run(hub, "-c", STOPPED, "profile", "-m", "lab/model", "--out", str(folder), *ASKED)
    assert done.returncode == 130, done.stderr
    (hub / "models--lab--model" / "refs" / "main").write_text(COMMITS[1])
    done = run(hub, "-m", "sinklens", "profile", "-q", "--resume", str(folder))
    assert done.returncode == 3, done.stderr
    assert "the model changed since it was started" in done.stderr
    assert "revision was aaaaaaaaaaaa... and is bbbbbbbbbbbb..." in done.stderr
    (hub / "models--lab--model" / "refs" / "main").write_text(COMMITS[0])
    done = run(hub, "-m", "sinklens", "profile", "-q", "--resume", str(folder))
    assert done.returncode == 0, done.stderr
