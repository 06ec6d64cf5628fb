"""`sinklens ls`: what there is to choose from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated

import typer

NAME = "ls"
HELP = "List analyzers, mitigations, tasks, models, corpora, presets, signals, backends or published reference values."
EXAMPLES = "Examples:  sinklens ls analyzers  ·  sinklens ls models  ·  sinklens ls references -m llama-2-7b"

Rows = list[dict[str, str]]


def command(
    what: Annotated[
        str,
        typer.Argument(
            help="analyzers, mitigations, tasks, models, corpora, presets, signals, backends or references."
        ),
    ] = "analyzers",
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="references: of this model or its family only.")
    ] = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="references: also values that nobody read again.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    from sinklens.core.errors import UsageError
    from sinklens.core.suggest import did_you_mean

    if what not in LISTS:
        raise UsageError(
            f"There is no list {what!r}.",
            detail=did_you_mean(what, LISTS) or f"There are: {', '.join(LISTS)}.",
        )
    if what != "references" and (model is not None or unverified):
        raise UsageError("--model and --unverified belong to: sinklens ls references")
    rows = references(model, unverified=unverified) if what == "references" else LISTS[what]()
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
        {
            "name": name,
            "runs": ("with pictures" if cls.of_pictures else "by default") if cls.default else "if named",
            "source": cls.reference.label,
            "finds": first_line(cls),
        }
        for name, cls in sorted(registry.items(), key=lambda item: item[1].place)
    ]


def mitigations() -> Rows:
    """Every method, with its parameters and whether a calibration can choose them."""
    import sinklens.mitigations as methods
    from sinklens.pipeline.methods import first_line

    rows = []
    for name, cls in sorted(methods.registry.items()):
        parameters = [f.name for f in dataclasses.fields(cls)]
        # Of a method without parameters of its own to be given, an instance says it; others choose by nothing.
        searched = cls.search is not methods.Method.search or bool(cls.grid)
        rows.append(
            {
                "name": name,
                "calibrates": "yes" if searched else "no",
                "source": cls.reference.label,
                "parameters": " ".join(parameters),
                "does": first_line(cls),
            }
        )
    return rows


def tasks() -> Rows:
    """The tasks with names of their own, then the kinds that files hold."""
    from sinklens.evaluation.tasks import BUILTINS, registry

    rows = [
        {
            "name": task.name,
            "for": " ".join(task.models) or "every language model",
            "about": task.about,
        }
        for task in BUILTINS.values()
    ]
    for kind, cls in registry.items():
        if kind == "lm-eval":
            rows.append({"name": "lm-eval:NAME", "for": "every language model", "about": _first(cls)})
        else:
            rows.append({"name": "task:FILE.jsonl", "for": f"kind {kind}", "about": _first(cls)})
    return rows


def _first(cls: type) -> str:
    return (cls.__doc__ or "").strip().split("\n", 1)[0]


def references(model: str | None = None, *, unverified: bool = False) -> Rows:
    """Published values, of one model (or its relatives) or of all."""
    from sinklens.pipeline.references import STATUS, of_model, published

    values = published(unverified=unverified) if model is None else of_model(model, unverified=unverified)
    return [
        {
            "model": value.model,
            "quantity": value.quantity,
            "value": value.words,
            "unit": value.unit,
            "meaning": value.title,
            "status": STATUS[value.status].partition(":")[0],
            "source": f"{value.source}, {value.where}",
            "protocol": value.protocol_words,
            "remark": value.remark,
        }
        for value in values
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


def backends() -> Rows:
    from sinklens.pipeline.backends import backend_rows

    return backend_rows()


LISTS: dict[str, Callable[[], Rows]] = {
    function.__name__: function
    for function in (analyzers, mitigations, tasks, models, corpora, presets, signals, backends, references)
}
