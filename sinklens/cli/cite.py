"""`sinklens cite`: how to cite exactly what was run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NAME = "cite"
HELP = "Print BibTeX of what a run used, or a methods paragraph of what it did."
EXAMPLES = "Examples:  sinklens cite runs/gpt2-... > methods.bib  ·  sinklens cite run1 --style methods"


def command(
    run: Annotated[Path, typer.Argument(help="Run folder written by `sinklens profile`.")],
    style: Annotated[str, typer.Option(help="bibtex or methods.")] = "bibtex",
) -> None:
    from sinklens.pipeline.cite import cite
    from sinklens.pipeline.run import load_run

    print(cite(load_run(run), style))
