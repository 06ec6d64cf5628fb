"""The folder of a mitigation run that lacks a part is refused in words, never read as if it were a plain run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import sinklens as sl
from sinklens.cli.main import main
from sinklens.core.errors import DataError
from sinklens.pipeline.mitigation_run import MitigationRun


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run = sl.mitigate(
        "bundled:dense-ind", "zero-tuning:gamma=0.5,zero-tuning:gamma=1", n=2, n_items=6, out=folder
    )
    assert [entry["acted"] for entry in run.entries] == [True, False]
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def refused(folder: Path, part: str) -> DataError:
    with pytest.raises(DataError, match=part) as caught:
        sl.load(folder)
    assert len(str(caught.value).splitlines()) <= 4
    assert caught.value.hint
    return caught.value


def test_the_whole_folder_is_read(folder: Path) -> None:
    """A mitigation that did not act has no profile under it, and lacks none."""
    run = sl.load(folder)
    assert isinstance(run, MitigationRun)
    assert len(run.after) == 1


def test_a_missing_summary_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "summary.json").unlink()
    assert "--resume" in str(refused(folder, r"summary\.json is missing").hint)
    assert main(["report", str(folder)]) == 3
    assert "summary.json is missing" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"mitigations": [{}]}', '{"mitigations": 3}', "\x00"])
def test_a_damaged_summary_is_named(folder: Path, content: str) -> None:
    (folder / "summary.json").write_text(content, encoding="utf-8")
    refused(folder, r"summary\.json is damaged")


@pytest.mark.parametrize("part", ["", "manifest.json", "arrays.safetensors"])
def test_a_missing_profile_under_a_mitigation_is_named(folder: Path, part: str) -> None:
    (under,) = (folder / "after").iterdir()
    if part:
        (under / part).unlink()
    else:
        shutil.rmtree(folder / "after")
    refused(folder, "arrays" if part.startswith("arrays") else r"its part after.zero-tuning.* is missing")


def test_a_report_of_another_version_says_which_one_reads_it(folder: Path) -> None:
    path = folder / "report.html"
    html = path.read_text(encoding="utf-8")
    assert sl.load(path) == json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for old in ('"schema":"sinklens/report/1"', '"schema":"sinklens/run/1"'):
        changed = html.replace(old, old.replace("/1", "/2"), 1)
        changed = changed.replace('"version":"0.1.0"', '"version":"3.4.5"', 1)
        assert changed != html
        path.write_text(changed, encoding="utf-8")
        assert "sinklens 3.4.5, which wrote it" in str(refused(path, "another version").hint)
