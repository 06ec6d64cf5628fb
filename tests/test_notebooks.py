"""The gallery: every notebook runs from a clean kernel, offline, and is kept with its results."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GALLERY = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in GALLERY]


def cells(path: Path) -> list[dict[str, Any]]:
    return [
        cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"
    ]


def test_there_is_a_gallery() -> None:
    assert len(GALLERY) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("path", GALLERY, ids=NAMES)
def test_it_runs_from_a_clean_kernel(path: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copy(path, tmp_path))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbmake",
        "--nbmake-timeout=240",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, "-c", os.devnull, "--rootdir", str(tmp_path), str(copied)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "1 passed" in done.stdout


@pytest.mark.parametrize("path", GALLERY, ids=NAMES)
def test_it_is_kept_with_its_results(path: Path) -> None:
    found = cells(path)
    assert [cell["execution_count"] for cell in found] == list(range(1, len(found) + 1))
    kinds = [output["output_type"] for cell in found for output in cell["outputs"]]
    assert "error" not in kinds
    assert len(kinds) >= 3
    text = path.read_text(encoding="utf-8")
    assert len(text) < 400_000
    assert not re.search(r"/(?:home|root|tmp|work|Users)/", text)


@pytest.mark.parametrize("path", GALLERY, ids=NAMES)
def test_its_pieces_are_small_and_without_scripts(path: Path) -> None:
    pieces = [
        "".join(output["data"]["text/html"])
        for cell in cells(path)
        for output in cell["outputs"]
        if "text/html" in output.get("data", {})
    ]
    assert all(len(piece) < 100_000 and "<script" not in piece for piece in pieces)
