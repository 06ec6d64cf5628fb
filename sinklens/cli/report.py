"""`sinklens report`: write the HTML report of a run folder again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NAME = "report"
HELP = "Write the HTML report of a run folder."
EXAMPLES = "Examples:  sinklens report runs/gpt2-...  ·  sinklens report run1 --out run1.html --no-text"


def command(
    run: Annotated[Path, typer.Argument(help="Run folder written by `sinklens profile`.")],
    out: Annotated[Path | None, typer.Option(help="HTML file. [default: RUN/report.html]")] = None,
    no_text: Annotated[bool, typer.Option("--no-text", help="Hashes and counts instead of tokens.")] = False,
    analyzers: Annotated[
        str | None, typer.Option(help="Other definitions on the same trace, e.g. primary-sinks:epsilon=0.2.")
    ] = None,
) -> None:
    from sinklens.core.errors import UsageError
    from sinklens.pipeline.mitigation_run import is_mitigation_folder, load_mitigation_run
    from sinklens.pipeline.run import load_run

    loaded = load_mitigation_run(run) if is_mitigation_folder(run) else load_run(run)
    if analyzers:
        loaded = loaded.analyze(*(item.strip() for item in analyzers.split(",") if item.strip()))
    try:
        print(loaded.report(out, include_text=not no_text))
    except OSError as error:
        raise UsageError(
            f"The report cannot be written: {error.strerror}: {out or run}.", hint="Use --out."
        ) from error
