"""Several runs on one page: what else differs between them, their numbers, and one small plot per number."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sinklens.core.canonical import plain
from sinklens.core.errors import DataError
from sinklens.core.figures import Figure, Lines

from . import assets, colour, embed, page, tables, text, views
from .lines import XAxis
from .numbers import integer, number, percent

BESIDE = "run"
"""The x label of runs that stand side by side in no order; any other label is an axis."""

UNITS = {
    "strongest_position": "position that is the strongest sink, or, without a sink, the most attended one",
    "sink_rate": "% of (prompt, layer, head) whose attention to that position exceeds epsilon",
    "share": "mean attention to that position over prompts, layers and heads",
    "strongest_head": "attention to it by the head that gives it most, mean over prompts",
    "norm_ratio": "norm of its hidden state over the median token's, at the layer where that is largest",
    "max_ratio": "largest |h| over the median of its layer",
    "value_drain": "norm of its value states over that of the others, where that is smallest; below 1 is value drain",
    "massive_dims": "dimensions with massive activations",
    "super_experts": "number of Super Experts",
}
_FRONT = ("run", "x", "model", "verdict")
_SHOWN_SETTINGS, _SHOWN_DIMS, _NAMED_TICKS, _NAME_LENGTH = 8, 6, 6, 60
_ORDER = ("inputs", "tracing", "seeds", "status", "sinklens", "versions", "device", "platform")
_SAME_PROMPTS = ("inputs.sha256", "inputs.n_prompts", "inputs.n_tokens")
_LENGTHS = ("inputs.seq_len", "inputs.shortest", "inputs.longest")
_WIDTH, _HEIGHT = 384, 224
_MOST_REASONS = 24


@dataclass(frozen=True)
class Setting:
    """A part of the manifests that is not the same for all runs; one value per group of runs."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Differences:
    """What differs, as a table whose columns are groups of runs that agree in all of it.

    Attributes:
        groups: Name of each group.
        first, rest: The settings that tell most, and the others.
    """

    groups: tuple[str, ...]
    first: tuple[Setting, ...]
    rest: tuple[Setting, ...]


def render_comparison(document: Mapping[str, Any], figures: Sequence[Figure]) -> str:
    """The comparison as one self-contained HTML string.

    Args:
        document: The `sinklens/compare/1` document: `x_label`; `rows` with `run, x, model, verdict` and numbers;
            `differences` with run name to dotted key to `[value in the first run, value here]`; `summaries` with
            `finding, label` and `values` by run; `unmapped`, maps that cannot be subtracted, with the reason.
        figures: Curves, one per number, over the same x; then maps of differences.

    Raises:
        DataError: `document` is not a `sinklens/compare/1` document with at least one row.
    """
    record = plain(document)
    assert isinstance(record, dict)
    rows: list[dict[str, Any]] = record.get("rows") or []
    if record.get("schema") != embed.COMPARE_SCHEMA or not rows:
        found = record.get("schema") if rows else "no rows"
        raise DataError(
            "This is not the document of a sinklens comparison.",
            detail=f"Expected schema {embed.COMPARE_SCHEMA!r} with rows, found {found!r}.",
            hint="Compare run folders: sinklens compare RUN RUN [RUN ...]",
        )
    x_label = text.shorten(str(record.get("x_label") or BESIDE), _NAME_LENGTH)
    differences: dict[str, Any] = record.get("differences") or {}
    data: dict[str, Any] = {}
    curves = [figure for figure in figures if isinstance(figure, Lines)]
    small, caption = _without_common_caption([_small(figure) for figure in curves])
    drawn = views.draw_all("plot", small, data, **_lines_options(rows, x_label))
    maps = views.draw_all("map", [f for f in figures if not isinstance(f, Lines)], data)
    payload = {"schema": embed.SCHEMA, "document": record, "figures": data, "tokens": None, "text": True}
    script = assets.script()
    headline = title(rows, x_label)
    return assets.template("comparison.html").render(
        title=f"{text.shorten(headline, 120)} · sinklens",
        body_class="trusted",
        headline=headline,
        sentence=sentence(rows, x_label),
        notes=notes(rows, differences),
        models=list(dict.fromkeys(str(row["model"]) for row in rows if row.get("model"))),
        differences=group(rows, differences),
        table=table(rows, x_label),
        missing=missing(rows),
        heading="Side by side" if x_label == BESIDE else f"By {x_label}",
        figures=drawn,
        maps=maps,
        unmapped=[text.shorten(str(why), 240) for why in (record.get("unmapped") or [])[:_MOST_REASONS]],
        summaries=summary_table(record.get("summaries") or [], rows),
        caption=caption,
        script=Markup(script),
        script_hash=embed.script_hash(script),
        style=Markup(assets.stylesheet()),
        payload=Markup(embed.script_json(payload)),
        block=embed.COMPARE_BLOCK,
        levels=colour.LEVELS,
    )


def write_comparison(
    path: str | os.PathLike[str], document: Mapping[str, Any], figures: Sequence[Figure]
) -> Path:
    """`render_comparison` into a file; an older page stays until the new one is complete. Returns the path."""
    return assets.write(path, render_comparison(document, figures))


def title(rows: Sequence[Mapping[str, Any]], x_label: str) -> str:
    """Which runs, over what: `6 runs of m over training step 20 to 500`."""
    models = {row.get("model") for row in rows}
    count = f"{len(rows)} run{'s' * (len(rows) != 1)}"
    of = f" of {_name(next(iter(models)))}" if len(models) == 1 and None not in models else ""
    if x_label != BESIDE:
        return f"{count}{of} over {x_label} {_place(rows[0]['x'])} to {_place(rows[-1]['x'])}"
    names = [_name(row["run"]) for row in rows]
    listed = _join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {integer(len(names) - 3)} more"
    return f"{count}{of} side by side: {listed}"


def sentence(rows: Sequence[Mapping[str, Any]], x_label: str) -> str:
    """How many runs have a sink, and between what the sink rate moves."""
    sinks = sum(row.get("verdict") == "sink" for row in rows)
    have = "has" if sinks == 1 else "have"
    said = f"{integer(sinks) if sinks else 'None'} of {integer(len(rows))} runs {have} an attention sink"
    rated = [row for row in rows if isinstance(row.get("sink_rate"), int | float)]
    if len(rated) < 2:
        return f"{said}."
    low, high = (
        (rated[0], rated[-1])
        if x_label != BESIDE
        else (min(rated, key=lambda row: row["sink_rate"]), max(rated, key=lambda row: row["sink_rate"]))
    )
    moves = "goes from" if x_label != BESIDE else "lies between"
    joint = "to" if x_label != BESIDE else "and"
    ends = [f"{percent(float(row['sink_rate']))} % ({_name(row['run'])})" for row in (low, high)]
    return f"{said}; the sink rate of the strongest position {moves} {ends[0]} {joint} {ends[1]}."


def notes(rows: Sequence[Mapping[str, Any]], differences: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What keeps the rows from being compared at face value."""
    found = []
    failed = [_name(row["run"]) for row in rows if row.get("verdict") == "untrusted"]
    if failed:
        found.append(f"A check failed in {_join(failed)}: nothing measured there can be relied on.")
    keys = {key for changed in differences.values() for key in changed}
    if keys & set(_SAME_PROMPTS):
        found.append("The runs did not read the same prompts: rows differ for that reason too.")
    if keys & set(_LENGTHS):
        found.append("The prompts differ in length between the runs, and sink rates depend on length.")
    return found


def group(rows: Sequence[Mapping[str, Any]], differences: Mapping[str, Mapping[str, Any]]) -> Differences:
    """The differences by groups of runs that agree, in the order of the runs."""
    base = {key: pair[0] for changed in differences.values() for key, pair in changed.items()}
    ordered = sorted(base, key=_importance)
    columns: dict[str, tuple[list[str], list[Any]]] = {}
    for row in rows:
        changed = differences.get(row["run"], {})
        values = [changed[key][1] if key in changed else base[key] for key in ordered]
        columns.setdefault(json.dumps(values, sort_keys=True), ([], values))[0].append(str(row["run"]))
    settings = [
        Setting(_setting(key), tuple(_value(key, values[i]) for _, values in columns.values()))
        for i, key in enumerate(ordered)
    ]
    folded = {i for i, key in enumerate(ordered) if _importance(key)[1]} | set(
        range(_SHOWN_SETTINGS, len(ordered))
    )
    return Differences(
        tuple(_group_name(names) for names, _ in columns.values()),
        tuple(s for i, s in enumerate(settings) if i not in folded),
        tuple(s for i, s in enumerate(settings) if i in folded),
    )


def table(rows: Sequence[Mapping[str, Any]], x_label: str) -> tables.Table:
    """One row per run; columns without any value are left out, see `missing`."""
    named = {key for row in rows for key, value in row.items() if value is not None}
    if len({row.get("model") for row in rows}) == 1:
        named -= {"model"}
    if x_label == BESIDE and len(rows) <= _NAMED_TICKS:
        named -= {"x"}
    keys = [key for key in (*_FRONT, *UNITS) if key in named]
    keys += [key for row in rows for key in row if key in named and key not in keys]
    x_name = "number" if x_label == BESIDE else x_label
    shown = [
        {x_name if key == "x" else key: _cell(key, row.get(key)) for key in dict.fromkeys(keys)}
        for row in rows
    ]
    built = tables.table(shown, UNITS)
    assert built is not None
    at = {column.key: i for i, column in enumerate(built.columns)}
    marked = tuple(
        _marked(made, at, row.get("verdict"), cell["run"])
        for made, row, cell in zip(built.rows, rows, shown, strict=False)
    )
    return replace(built, rows=marked)


def summary_table(
    summaries: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> tables.Table | None:
    """The numbers of all findings, those first that are not the same in all runs."""
    ordered = sorted(summaries, key=lambda entry: not entry.get("differs"))
    names = {f"run {i}": row["run"] for i, row in enumerate(rows)}
    shown = [
        {"finding": page.words(entry["finding"]), "number": entry["label"]}
        | {key: (entry.get("values") or {}).get(run) for key, run in names.items()}
        for entry in ordered
    ]
    return tables.table(shown, {}, {key: _name(run) for key, run in names.items()})


def missing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Numbers that no run has."""
    return [page.words(key) for key in UNITS if all(row.get(key) is None for row in rows) and key in rows[0]]


def _marked(row: tables.Row, at: Mapping[str, int], status: Any, name: str) -> tables.Row:
    cells = list(row.cells)
    cells[at["run"]] = tables.Cell(_name(name), header=True)
    if "verdict" in at:
        cells[at["verdict"]] = replace(cells[at["verdict"]], verdict=str(status))
    return replace(row, cells=tuple(cells))


def _cell(key: str, value: Any) -> Any:
    if key == "verdict":
        return page.headline(str(value))
    if key == "x":
        return _whole(value)
    if isinstance(value, list):
        more = f" and {integer(len(value) - _SHOWN_DIMS)} more" if len(value) > _SHOWN_DIMS else ""
        return ", ".join(number(item) for item in value[:_SHOWN_DIMS]) + more if value else "none"
    return value


def _small(figure: Lines) -> Lines:
    """The figure as one of many: one curve needs no legend, and the caption need not repeat the title."""
    series = tuple(replace(s, name="") for s in figure.series) if len(figure.series) == 1 else figure.series
    rest = figure.caption.removeprefix(figure.title).lstrip(" ,.;:")
    return replace(figure, series=series, caption=rest[:1].upper() + rest[1:])


def _without_common_caption(figures: list[Lines]) -> tuple[list[Lines], str]:
    """The figures and, if they all have the same caption, that caption, which is then said once."""
    captions = {figure.caption for figure in figures}
    if len(figures) < 2 or len(captions) > 1:
        return figures, ""
    return [replace(figure, caption="") for figure in figures], captions.pop()


def _lines_options(rows: Sequence[Mapping[str, Any]], x_label: str) -> dict[str, Any]:
    xs = [float(row["x"]) for row in rows]
    if x_label != BESIDE:
        return {"width": _WIDTH, "height": _HEIGHT, "x_axis": XAxis((min(xs), max(xs)))}
    few = len(rows) <= _NAMED_TICKS
    names = {float(row["x"]): str(row["run"]) for row in rows} if few else {}
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "x_axis": XAxis((min(xs) - 0.5, max(xs) + 0.5), names, joined=False),
    }


def _importance(key: str) -> tuple[int, bool, str]:
    """Order of a setting, and whether it stands among the details: counts of tokens and lists of warnings."""
    part = key.partition(".")[0]
    detail = key.startswith(("inputs.first_tokens", "inputs.warnings", "inputs.domains"))
    return _ORDER.index(part) if part in _ORDER else len(_ORDER), detail, key


def _setting(key: str) -> str:
    return text.shorten(" › ".join(page.words(part) for part in key.split(".")), _NAME_LENGTH)


def _value(key: str, value: Any) -> str:
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{32,}", value):
        return value[:12] + "…"
    return text.shorten(page.reading(key.rpartition(".")[2], value), 160)


def _group_name(names: Sequence[str]) -> str:
    shown = [text.shorten(name, 40) for name in names[:3]]
    return ", ".join(shown) + (f" and {integer(len(names) - 3)} more" if len(names) > 3 else "")


def _name(name: Any) -> str:
    return text.shorten(str(name), _NAME_LENGTH)


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _place(value: Any) -> str:
    return number(_whole(value))
