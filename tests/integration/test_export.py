"""`export`: what is written is what was measured, in every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import sinklens
from sinklens.cli.main import main
from sinklens.pipeline import export as module
from sinklens.tracers import signals as sig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on prompts of different lengths."""
    path = tmp_path_factory.mktemp("export") / "run"
    whole = sinklens.profile(n=3, analyzers=("primary-sinks",), verify=False).trace
    sinklens.profile(
        prompts=[record.token_ids[:n].tolist() for record, n in zip(whole, (37, 48, 41), strict=True)],
        analyzers=("primary-sinks", "massive-activations", "super-experts"),
        verify=False,
        out=path,
    )
    return path


@pytest.fixture(scope="module")
def run(folder: Path) -> Any:
    return sinklens.load(folder)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_are_the_findings_and_the_signals(
    kind: str, folder: Path, run: Any, tmp_path: Path, capsys: Any
) -> None:
    to = tmp_path / "tables"
    assert main(["export", str(folder), "--format", kind, "--to", str(to)]) == 0
    printed = capsys.readouterr().out.split()
    assert {Path(line) for line in printed} == {path for path in to.rglob("*") if path.is_file()}
    read = pd.read_csv if kind == "csv" else pd.read_parquet
    found = read(to / "findings" / f"primary-sinks.{kind}")
    assert found["rate"].tolist() == pytest.approx([row["rate"] for row in run.primary_sinks.rows])
    received = read(to / "signals" / f"attention_received.{kind}")
    for record in run.trace:
        mine = received[received["prompt"] == record.index]
        array = record[sig.ATTENTION_RECEIVED]
        assert len(mine) == array.size
        row = mine[(mine["layer"] == 1) & (mine["head"] == 0) & (mine["pos"] == 7)]
        at = np.flatnonzero(record[sig.KEPT_POSITIONS] == 7)[0]
        assert row["value"].item() == pytest.approx(array[1, 0, at])
    prompts = read(to / f"prompts.{kind}")
    assert prompts["n_tokens"].tolist() == [len(record) for record in run.trace]
    columns = json.loads((to / "columns.json").read_text(encoding="utf-8"))
    assert columns["signals"]["attention_received"]["unit"] == "share"
    assert columns["findings"]["super-experts"]["status"] == "not-applicable"


def test_netcdf_holds_every_signal_padded_by_nan(folder: Path, run: Any, tmp_path: Path) -> None:
    import xarray as xr

    assert main(["export", str(folder), "--format", "netcdf", "--to", str(tmp_path / "nc")]) == 0
    with xr.open_dataset(tmp_path / "nc" / "run.nc", engine="scipy") as data:
        assert set(data.data_vars) >= {signal.name for signal in run.trace.signals}
        assert data["residual_norm"].dims == ("prompt", "layer", "pos")
        assert data["residual_norm"].attrs["unit"] == "L2 norm"
        assert data.attrs["model"] == run.trace.info.id
        for i, record in enumerate(run.trace):
            held = data["residual_norm"].values[i]
            np.testing.assert_array_equal(held[:, : len(record)], record[sig.RESIDUAL_NORM])
            assert np.isnan(held[:, len(record) :]).all()
        assert (
            data["residual_top_dim"].values[0].tolist()
            == run.trace.records[0].arrays["residual_top_dim"].tolist()
        )


def test_chosen_signals_only(folder: Path, tmp_path: Path, capsys: Any) -> None:
    to = str(tmp_path / "few")
    assert main(["export", str(folder), "--signals", "residual_norm,value_norm", "--to", to]) == 0
    assert {path.stem for path in (tmp_path / "few" / "signals").iterdir()} == {"residual_norm", "value_norm"}
    assert main(["export", str(folder), "--signals", "residual_nrm", "--to", str(tmp_path / "none")]) == 2
    assert "residual_norm" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_every_figure_becomes_a_file(kind: str, folder: Path, run: Any, tmp_path: Path) -> None:
    to = tmp_path / "figures"
    assert main(["export", str(folder), "--format", "figures", "--kind", kind, "--to", str(to)]) == 0
    wanted = {f"{name}-{figure.key}.{kind}" for name, found in run.figures.items() for figure in found}
    assert {path.name for path in to.iterdir()} == wanted
    start = b"\x89PNG" if kind == "png" else b"<?xml"
    assert all(path.read_bytes().startswith(start) for path in to.iterdir())


def test_without_text_no_token_is_written(folder: Path, run: Any, tmp_path: Path) -> None:
    assert main(["export", str(folder), "--no-text", "--to", str(tmp_path / "quiet")]) == 0
    found = pd.read_csv(tmp_path / "quiet" / "findings" / "primary-sinks.csv")
    assert not {"token", "token_id"} & set(found.columns)
    assert "position" in found.columns
    assert "text" not in pd.read_csv(tmp_path / "quiet" / "prompts.csv").columns


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("--format", "excel"), "There are: csv"), (("--format", "figures", "--kind", "gif"), "pdf, svg, png")],
)
def test_unknown_formats(
    arguments: tuple[str, ...], says: str, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(["export", str(folder), *arguments, "--to", str(tmp_path / "x")]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_in_use_is_not_written_into(folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["export", str(folder), "--to", str(tmp_path)]) == 2
    assert "--force" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert main(["export", str(folder), "--to", str(tmp_path), "--force"]) == 0
    blocked = tmp_path / "mine.txt" / "below"
    assert main(["export", str(folder), "--to", str(blocked)]) == 4


def test_a_missing_library_is_named(folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    real = module.find_spec
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "xarray" else real(name))
    assert main(["export", str(folder), "--format", "netcdf", "--to", str(tmp_path / "nc")]) == 2
    said = capsys.readouterr().err
    assert "sinklens[xarray]" in said
    assert "parquet" in said
