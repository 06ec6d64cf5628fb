"""Tasks from files, datasets of the hub, and plain Python rows.

A JSONL file has one question per line; a first line `{"task": {...}}` may set what else the task takes. The kind
follows from the fields unless it is named:

    {"text": ...}                                        perplexity
    {"prompt": ..., "choices": [...], "answer": 2}       choice (`answer` may be the text of the choice)
    {"prompt": ..., "label": "positive"}                 classification
    {"prompt": ..., "image": "a.png", "answer": "yes"}   yes-no
    {"prompt": ..., "image": "a.png", "objects": [...]}  captions
    {"prompt": ..., "reference": ...}                    generation

`text`, `question` and `prompt` are the same field where the others tell the kind.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sinklens.core.errors import DataError, UsageError
from sinklens.core.suggest import did_you_mean

from ..items import Item
from .base import Task, registry
from .classification import with_labels

PROMPTS = ("prompt", "question", "text", "sentence", "context")
INSTEAD = "save its rows to a file: --task task:FILE.jsonl"
"""What helps where a dataset of the hub cannot be read."""
HUB_ROWS = 2000
"""Rows of a hub dataset that are read at most."""


def task_from_file(path: str | Path, *, name: str | None = None, **settings: Any) -> Task:
    """A task from a JSONL file.

    Args:
        settings: What its kind takes (`by`, `window`, ...), before what the file says.

    Raises:
        DataError: The file cannot be read, or a line cannot be used; the message names it.
    """
    path = Path(path)
    rows = [(f"{path.name}:{number}", row) for number, row in _lines(path)]
    head = rows[0][1].get("task") if rows else None
    if isinstance(head, Mapping) and len(rows[0][1]) == 1:
        settings = {**head, **settings}
        rows = rows[1:]
    if not rows:
        raise DataError(f"The task file {path.name!r} has no question.")
    rows = [(where, _with_folder(row, path.parent)) for where, row in rows]
    return make_task(name or path.stem, rows, **settings)


def task_from_hub(spec: str, **settings: Any) -> Task:
    """A task from `dataset[:config[:split]]` of the hub; its columns are read as the fields of a file."""
    from itertools import islice

    from sinklens.inputs.hub import _load, _parts, _rows

    name, config, split, _ = _parts(spec)
    rows = _rows(_load(name, config, split, instead=INSTEAD), spec)
    label = Path(name).name
    named = [
        (f"hf:{label}:{split}:{i}", _plain_labels(dict(row))) for i, row in enumerate(islice(rows, HUB_ROWS))
    ]
    if not named:
        raise DataError(f"The dataset {label!r} has no row in its split {split!r}.")
    return make_task(label, named, **settings)


def task_from_rows(rows: Iterable[Mapping[str, Any]], *, name: str = "task", **settings: Any) -> Task:
    """A task from mappings with the fields of a file."""
    return make_task(name, [(f"{name}#{i}", dict(row)) for i, row in enumerate(rows)], **settings)


def make_task(name: str, rows: Sequence[tuple[str, Mapping[str, Any]]], **settings: Any) -> Task:
    """A task from named rows."""
    if not rows:
        raise DataError(f"The task {name!r} has no row.")
    kind = settings.pop("kind", None) or kind_of(rows[0][1], rows[0][0])
    cls = registry[kind]
    items = tuple(_item(row, where, kind) for where, row in rows)
    if kind == "classification":
        items = with_labels(items, name)
    return cls(name=name, items=items, **checked_settings(cls, settings))


def checked_settings(cls: type[Task], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that the kind has, tuples in place of lists.

    Raises:
        UsageError: Naming the nearest one.
    """
    known = {f.name for f in fields(cls)} - {"name", "items"}
    for key in settings:
        if key not in known:
            raise UsageError(
                f"A task of kind {cls.kind!r} has no setting {key!r}.",
                detail=did_you_mean(key, known) or f"It has: {', '.join(sorted(known))}.",
            )
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def kind_of(row: Mapping[str, Any], where: str) -> str:
    """The kind of task that a row's fields belong to.

    Raises:
        DataError: They belong to none.
    """
    has = {key for key, value in row.items() if value is not None}
    if "choices" in has or "options" in has:
        return "choice"
    if "objects" in has:
        return "captions"
    if "label" in has:
        return "classification"
    answer = str(row.get("answer", "")).strip().lower()
    if answer in ("yes", "no", "true", "false"):
        return "yes-no"
    if "reference" in has:
        return "generation"
    if "text" in has:
        return "perplexity"
    raise DataError(
        f"{where}: no kind of task has these fields: {', '.join(sorted(map(str, row))) or 'none'}.",
        detail="Known: text · prompt, choices, answer · prompt, label · prompt, answer yes or no · prompt, objects · "
        "prompt, reference.",
        hint='Name the kind in the first line: {"task": {"kind": "choice"}}',
    )


def _item(row: Mapping[str, Any], where: str, kind: str) -> Item:
    prompt = next((row[key] for key in PROMPTS if row.get(key)), None)
    if isinstance(prompt, list) and all(isinstance(part, int) for part in prompt):
        prompt = tuple(prompt)
    if not isinstance(prompt, (str, tuple)):
        raise DataError(
            f"{where}: there is no text to ask.",
            detail=f"One of these fields must hold it: {', '.join(PROMPTS)}.",
        )
    choices = tuple(map(str, _choices(row)))
    answer = row.get("label") if kind == "classification" else row.get("answer", row.get("answerKey"))
    if kind == "choice":
        answer = _index(answer, choices, row, where)
    return Item(
        id=where,
        prompt=prompt,
        choices=choices,
        answer=answer,
        objects=tuple(map(str, row.get("objects") or ())),
        reference=str(row.get("reference") or ""),
        image=row.get("image"),
        group=str(row.get("domain") or (answer if kind == "choice" else "")),
    )


def _choices(row: Mapping[str, Any]) -> Sequence[Any]:
    found = row.get("choices", row.get("options")) or ()
    # Datasets of the ARC kind keep texts and their letters side by side.
    return found["text"] if isinstance(found, Mapping) else found


def _index(answer: Any, choices: tuple[str, ...], row: Mapping[str, Any], where: str) -> int:
    """The answer as an index: given as one, as the text of a choice, or as its letter."""
    given = row.get("choices")
    letters = list(given.get("label", ())) if isinstance(given, Mapping) else []
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    for known in (list(choices), letters, [chr(ord("A") + i) for i in range(len(choices))]):
        if str(answer) in known:
            return known.index(str(answer))
    raise DataError(
        f"{where}: the answer {answer!r} is none of the {len(choices)} choices.",
        hint="Give its index (from 0), its text or its letter.",
    )


def _with_folder(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    image = row.get("image")
    if isinstance(image, str) and not Path(image).is_absolute():
        return {**row, "image": str(folder / image)}
    return dict(row)


def _plain_labels(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}


def _lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    from sinklens.inputs.files import numbered_lines

    rows = []
    one_each = "A task file has one JSON object per line."
    for number, line in numbered_lines(path, what="task", absent="See: sinklens ls tasks", empty=one_each):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path.name}:{number} is not valid JSON: {error.msg} at column {error.colno}.",
                hint=one_each,
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{path.name}:{number} is not a JSON object but {type(row).__name__}.")
        rows.append((number, row))
    return rows
