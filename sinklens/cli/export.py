"""`sinklens export`: a run's tables, signals and figures for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NAME = "export"
HELP = "Write a run's findings and signals as CSV, parquet or netCDF, or its figures as PDF, SVG or PNG."
EXAMPLES = (
    "Examples:  sinklens export runs/gpt2-... --format parquet --to tables  ·  "
    "sinklens export run1 --format netcdf --signals attention_received --to arrays  ·  "
    "sinklens export run1 --format figures --kind svg --to figures"
)


def command(
    run: Annotated[Path, typer.Argument(help="Run folder written by `sinklens profile`.")],
    format: Annotated[str, typer.Option("--format", help="csv, parquet, netcdf or figures.")] = "csv",
    to: Annotated[Path, typer.Option("--to", help="Folder to write.")] = Path("export"),
    signals: Annotated[
        str | None, typer.Option(help="Comma-separated; see `sinklens ls signals`. [default: all recorded]")
    ] = None,
    kind: Annotated[str, typer.Option(help="Of figures: pdf, svg or png.")] = "pdf",
    no_text: Annotated[bool, typer.Option("--no-text", help="Leave out what the prompts say.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that holds files.")] = False,
) -> None:
    from sinklens.pipeline.export import export
    from sinklens.pipeline.run import load_run

    wanted = None if signals is None else [name.strip() for name in signals.split(",") if name.strip()]
    written = export(
        load_run(run), format, to, signals=wanted, kind=kind, include_text=not no_text, force=force
    )
    for path in written:
        print(path)
