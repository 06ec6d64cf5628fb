"""A run folder with a missing, cut or foreign part says which part; what is not needed to read it does not matter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sinklens as sl
from sinklens.core.errors import DataError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    sl.profile("bundled:dense-ind", analyzers=["primary-sinks"], n=2).save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize("name", ["manifest.json", "arrays.safetensors"])
@pytest.mark.parametrize("harm", ["missing", "cut", "foreign", "empty"])
def test_the_damaged_part_is_named(folder: Path, name: str, harm: str) -> None:
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if harm != "missing":
        path.write_bytes(
            {"cut": content[: len(content) // 2], "foreign": b"\xff\x00no" * 40, "empty": b""}[harm]
        )
    with pytest.raises(DataError, match=name):
        sl.load(folder)


@pytest.mark.parametrize("content", ["[]", "null", "3"])
def test_a_manifest_that_is_no_object(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        sl.load(folder)


@pytest.mark.parametrize("part", ["model", "layers", "tracing"])
def test_a_manifest_without_a_section(folder: Path, part: str) -> None:
    rewrite(folder, lambda manifest: manifest.pop(part))
    with pytest.raises(DataError, match=rf"manifest\.json is damaged.*{part}"):
        sl.load(folder)


def test_another_schema_names_the_version_that_reads_it(folder: Path) -> None:
    def newer(manifest: dict[str, Any]) -> None:
        manifest["schema"] = "sinklens/run/2"
        manifest["sinklens"]["version"] = "3.4.5"

    rewrite(folder, newer)
    with pytest.raises(DataError, match=r"schema 'sinklens/run/2'") as caught:
        sl.load(folder)
    assert "written by sinklens 3.4.5" in (caught.value.hint or "")
    rewrite(folder, lambda manifest: manifest.pop("sinklens"))
    with pytest.raises(DataError) as caught:
        sl.load(folder)
    assert "does not say which" in (caught.value.hint or "")


def test_what_is_made_from_the_arrays_is_not_needed(saved: Path, folder: Path) -> None:
    for name in ("report.html", "summary.json", "prompts.jsonl"):
        (folder / name).unlink()
    shutil.rmtree(folder / "tables")
    left, whole = sl.load(folder), sl.load(saved)
    assert isinstance(left, sl.Run)
    assert isinstance(whole, sl.Run)
    assert left.document["findings"] == whole.document["findings"]
