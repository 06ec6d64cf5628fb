"""A run for other programs: tidy tables per finding and signal, one netCDF file, or figures."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sinklens.core.errors import ResourceError, UsageError
from sinklens.core.figures import PictureMap
from sinklens.core.suggest import did_you_mean
from sinklens.tracers.signals import BY_NAME, Signal

from .run import Run

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

FORMATS = ("csv", "parquet", "netcdf", "figures")
KINDS = ("pdf", "svg", "png")
TEXT_COLUMNS = re.compile(r"(?:^|_)(?:tokens?|token_ids?|pieces)$")
COLUMNS = "columns.json"
PAGE_WIDTH = 6.9
"""Of figures with pictures, in inches: both columns of a paper."""


def export(
    run: Run,
    format: str,
    to: str | Path,
    *,
    signals: Sequence[str] | None = None,
    kind: str = "pdf",
    include_text: bool = True,
    force: bool = False,
) -> list[Path]:
    """Write a run into a folder.

    Args:
        format: `csv` or `parquet`: a table per finding (`findings/`), per signal (`signals/`) and of the prompts, with
            units and meanings in `columns.json`. `netcdf`: all signals in `run.nc`. `figures`: one file per figure, of
            figures with pictures one per picture.
        signals: Names; None takes all that were recorded.
        kind: Of figures: `pdf`, `svg` or `png`.
        include_text: Whether token strings and ids are written, and pictures drawn.
        force: Write into a folder that holds files already.

    Returns:
        The files written.

    Raises:
        UsageError: An unknown format or signal, a folder in use, or a library that is not installed.
        ResourceError: The files could not be written.
    """
    folder, wanted = Path(to), _wanted(run, signals)
    if format not in FORMATS:
        detail = did_you_mean(format, FORMATS) or f"There are: {', '.join(FORMATS)}."
        raise UsageError(f"Unknown format {format!r}.", detail=detail)
    if folder.exists() and not force and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder} exists and is not empty.", hint="Choose another folder with --to, or use --force."
        )
    try:
        if format == "figures":
            return _figures(run, folder, kind, run.pictures if include_text else {})
        if format == "netcdf":
            return [_netcdf(run, folder, wanted)]
        return _tables(run, folder, wanted, format, include_text)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = (
            f"The disk that holds {folder} is full."
            if full
            else f"{folder} cannot be written: {error.strerror}."
        )
        raise ResourceError(what, hint="Choose another folder with --to.") from error


def _wanted(run: Run, names: Sequence[str] | None) -> list[Signal]:
    recorded = sorted(run.trace.signals, key=lambda signal: signal.name)
    if names is None:
        return recorded
    known = [signal.name for signal in recorded]
    for name in names:
        if name not in known:
            raise UsageError(
                f"The run has no signal {name!r}.",
                detail=did_you_mean(name, known) or f"It has: {', '.join(known)}.",
                hint="Signals are recorded if an analyzer needs them; see: sinklens ls signals",
            )
    return [BY_NAME[name] for name in names]


# tables ----------------------------------------------------------------------------------------------------------


def _tables(run: Run, folder: Path, signals: list[Signal], format: str, include_text: bool) -> list[Path]:
    columns: dict[str, Any] = {"findings": {}, "signals": {}}
    written = []
    for name, finding in run.findings.items():
        if finding.rows:
            frame = finding.to_frame()
            kept = frame if include_text else frame.drop(columns=_texts(frame))
            written.append(_write(kept, folder / "findings" / name, format))
        columns["findings"][name] = {"status": str(finding.status), "units": finding.units}
    for signal in signals:
        written.append(_write(run.trace.to_frame(signal), folder / "signals" / signal.name, format))
        columns["signals"][signal.name] = {"unit": signal.unit, "meaning": signal.meaning}
    written.append(_write(prompt_table(run, include_text), folder / "prompts", format))
    path = folder / COLUMNS
    path.write_text(json.dumps(columns, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return [*written, path]


def _texts(frame: pd.DataFrame) -> list[str]:
    return [str(column) for column in frame.columns if TEXT_COLUMNS.search(str(column))]


def _write(frame: pd.DataFrame, stem: Path, format: str) -> Path:
    path = stem.with_name(f"{stem.name}.{format}")
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = frame.copy()
    plain.attrs = {}  # what they say is in columns.json; not every pandas can store them
    if format == "csv":
        plain.to_csv(path, index=False)
    else:
        plain.to_parquet(path, index=False)
    return path


def prompt_table(run: Run, include_text: bool) -> pd.DataFrame:
    """One row per prompt: index, source, domain, tokens, hash, and, if wanted, what it says."""
    import pandas as pd

    rows = []
    for record in run.trace:
        said = record.describe()
        text = {"text": " ".join(record.pieces)} if include_text else {}
        rows.append({key: said[key] for key in ("index", "source", "domain", "n_tokens", "sha256")} | text)
    return pd.DataFrame(rows)


# netCDF ----------------------------------------------------------------------------------------------------------


def _netcdf(run: Run, folder: Path, signals: list[Signal]) -> Path:
    if find_spec("xarray") is None:
        raise UsageError(
            "netCDF needs the library xarray, which is not installed.",
            hint="pip install 'sinklens[xarray]', or export as parquet.",
        )
    data = dataset(run, signals)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.nc"
    # h5netcdf stores files of any size; without it scipy writes the older format, whose integers have 32 bits.
    engine = "h5netcdf" if find_spec("h5netcdf") is not None else "scipy"
    data.to_netcdf(path, engine=engine)
    return path


def dataset(run: Run, signals: Sequence[Signal]) -> xr.Dataset:
    """Signals as one labelled data set. Prompts differ in length: shorter ones end in NaN (floats) or -1 (integers).

    Dimensions are those of the signals with `prompt` first. `kept` is a place in the list `kept_positions`, not a
    position.
    """
    import xarray as xr

    variables = {}
    for signal in signals:
        for name in (signal.name, f"{signal.name}_pos", f"{signal.name}_dim"):
            arrays = [record.arrays[name] for record in run.trace if name in record.arrays]
            if len(arrays) != len(run.trace):
                continue
            attributes = {
                "unit": signal.unit if name == signal.name else "index",
                "long_name": signal.meaning,
            }
            variables[name] = (("prompt", *signal.axes), _padded(arrays), attributes)
    info, made = run.trace.info, run.trace.manifest.get("sinklens", {})
    return xr.Dataset(
        variables,
        {"prompt": np.array([record.index for record in run.trace], dtype=np.int32)},
        {
            "model": info.id,
            "revision": info.revision or "",
            "family": info.family,
            "dtype": info.dtype,
            "sinklens": str(made.get("version", "")),
            "verdict": run.verdict.text,
        },
    )


def _padded(arrays: list[np.ndarray]) -> np.ndarray:
    shape = tuple(max(sizes) for sizes in zip(*(array.shape for array in arrays), strict=True))
    whole = np.issubdtype(arrays[0].dtype, np.integer)
    dtype = np.int32 if whole else arrays[0].dtype
    padded = np.full((len(arrays), *shape), -1 if whole else np.nan, dtype=dtype)
    for row, array in zip(padded, arrays, strict=True):
        row[tuple(slice(size) for size in array.shape)] = array
    return padded


# figures ---------------------------------------------------------------------------------------------------------


def _figures(run: Run, folder: Path, kind: str, pictures: dict[str, np.ndarray]) -> list[Path]:
    from sinklens.report import save_figure

    if kind not in KINDS:
        raise UsageError(f"Unknown kind of figure {kind!r}.", detail=f"There are: {', '.join(KINDS)}.")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figures in run.figures.items():
        for figure in figures:
            stem = f"{name}-{figure.key}"
            if not isinstance(figure, PictureMap):
                written.append(save_figure(figure, folder / f"{stem}.{kind}"))
                continue
            for place, page in enumerate(figure.pages):
                path = folder / f"{stem}-prompt{page.ref.prompt}-picture{page.ref.picture}.{kind}"
                written.append(save_figure(figure, path, width=PAGE_WIDTH, page=place, pictures=pictures))
    return written
