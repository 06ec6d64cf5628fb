"""`sinklens ls`: what there is to choose from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

NAME = "ls"
HELP = "List analyzers, models, corpora, presets or signals."
EXAMPLES = "Examples:  sinklens ls analyzers  ·  sinklens ls models  ·  sinklens ls presets --json"

Rows = list[dict[str, str]]


def command(
    what: Annotated[
        str, typer.Argument(help="analyzers, models, corpora, presets or signals.")
    ] = "analyzers",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    from sinklens.core.errors import UsageError
    from sinklens.core.suggest import did_you_mean

    if what not in LISTS:
        raise UsageError(
            f"There is no list {what!r}.",
            detail=did_you_mean(what, LISTS) or f"There are: {', '.join(LISTS)}.",
        )
    rows = LISTS[what]()
    if as_json:
        from .console import print_json

        print_json({what: rows})
        return
    widths = {key: max(len(row[key]) for row in rows) for key in rows[0]} if rows else {}
    for row in rows:
        print("  ".join(f"{value:<{widths[key]}}" for key, value in row.items()).rstrip())


def analyzers() -> Rows:
    from sinklens.analyzers import registry
    from sinklens.pipeline.methods import first_line

    return [
        {"name": name, "paper": cls.reference.label, "finds": first_line(cls)}
        for name, cls in sorted(registry.items(), key=lambda item: item[1].place)
    ]


def models() -> Rows:
    from sinklens.models.catalog import list_models

    return [{"name": entry.name, "opens": entry.target, "about": entry.about} for entry in list_models()]


def corpora() -> Rows:
    from sinklens.inputs import list_corpora

    return [
        {
            "name": c.name,
            "prompts": str(c.n_prompts),
            "characters": str(c.n_characters),
            "about": c.description,
        }
        for c in list_corpora()
    ]


def presets() -> Rows:
    from sinklens.pipeline.options import PRESETS

    return [{"name": name, "protocol": about} for name, (about, _) in PRESETS.items()]


def signals() -> Rows:
    from sinklens.tracers.signals import ALL_SIGNALS

    return [
        {"name": s.name, "axes": " ".join(s.axes), "unit": s.unit, "meaning": s.meaning} for s in ALL_SIGNALS
    ]


LISTS: dict[str, Callable[[], Rows]] = {
    function.__name__: function for function in (analyzers, models, corpora, presets, signals)
}
