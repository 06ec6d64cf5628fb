"""`sinklens compare`: runs side by side, and how sinks form over training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NAME = "compare"
HELP = "Set runs side by side: checkpoints of a training, revisions, models."
EXAMPLES = (
    "Examples:  sinklens compare run-base run-instruct  ·  sinklens compare runs/step-* --out dynamics.html"
)

SHOWN = 8
"""Settings that differ are named on the terminal up to this many; the page has all."""


def command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; names with step-N are drawn over steps.")],
    out: Annotated[Path, typer.Option(help="HTML file.")] = Path("comparison.html"),
    no_text: Annotated[bool, typer.Option("--no-text", help="Keep tokens out of the page.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    from sinklens.pipeline.compare import QUANTITIES, compare

    from .console import print_json

    comparison = compare(*runs)
    path = comparison.report(out, include_text=not no_text)
    if as_json:
        from sinklens.core.canonical import plain

        print_json(plain(comparison.to_json(include_text=not no_text)))  # type: ignore[arg-type]
        return
    columns = ["run", "verdict", *(name for name, *_ in QUANTITIES)]
    table = [[cell(row[name]) for name in columns] for row in comparison.rows]
    widths = [max(len(line[i]) for line in [columns, *table]) for i in range(len(columns))]
    for line in [columns, *table]:
        print("  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip())
    differing = sorted({key for found in comparison.differences.values() for key in found})
    if differing:
        print(f"Differ  {', '.join(differing[:SHOWN])}{', ...' if len(differing) > SHOWN else ''}")
    print(f"Report  {path}")


def cell(value: object) -> str:
    """A number or word in a table; a dash where a quantity does not apply."""
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
