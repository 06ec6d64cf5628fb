"""Prompt files: `.txt` with one prompt per line, `.jsonl` with one object per line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sinklens.core.errors import DataError
from sinklens.core.suggest import did_you_mean

from .sources import Document, Source, is_message


def read_text(path: str | Path) -> Source:
    """One prompt per line; blank lines are skipped."""
    path = Path(path)
    lines = [(number, line) for number, line in numbered_lines(path) if line.strip()]
    _require(lines, path)
    return Source(path.name, [Document(line, f"{path.name}:{number}") for number, line in lines])


def read_jsonl(path: str | Path, field: str = "text") -> Source:
    """One JSON object per line; `field` holds the text or a list of chat messages, `domain` is optional."""
    path = Path(path)
    lines = [(number, line) for number, line in numbered_lines(path) if line.strip()]
    _require(lines, path)
    documents = [_document(line, field, f"{path.name}:{number}") for number, line in lines]
    filled = [document for document in documents if document.content]
    _require(filled, path)
    return Source(path.name if field == "text" else f"{path.name}:{field}", filled)


def parse_row(row: Any, field: str, where: str) -> Document:
    """The document in one row of a JSONL file or a dataset.

    Args:
        row: The parsed row; must be a mapping that has `field`.
        where: What the row is called in messages and as the prompt's source, for instance `data.jsonl:17`.
    """
    if not isinstance(row, dict):
        raise DataError(
            f"{where} is not a JSON object but {type(row).__name__}.",
            hint='Each line looks like {"text": "The quick brown fox"}.',
        )
    if field not in row:
        found = ", ".join(map(repr, row)) or "none"
        raise DataError(
            f"{where} has no field {field!r}; fields found: {found}.",
            detail=did_you_mean(field, row),
            hint=f"Name the field that holds the text: {where.rpartition(':')[0]}:FIELD",
        )
    value = row[field]
    if not isinstance(value, str) and not (
        isinstance(value, list) and value and all(is_message(part) for part in value)
    ):
        raise DataError(
            f"{where}: the field {field!r} holds {type(value).__name__}, not text.",
            detail='Expected a string, or chat messages such as [{"role": "user", "content": "Hello"}].',
            hint=f"Fix the line, or name another field: {where.rpartition(':')[0]}:FIELD",
        )
    domain = row.get("domain", "")
    return Document(value, where, domain if isinstance(domain, str) else "")


def _document(line: str, field: str, where: str) -> Document:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as err:
        raise DataError(
            f"{where} is not valid JSON: {err.msg} at column {err.colno}.",
            hint="JSONL has one complete object per line; for plain lines of text use a .txt file.",
        ) from err
    return parse_row(row, field, where)


def numbered_lines(
    path: Path,
    *,
    what: str = "prompt",
    absent: str = "Without --prompts, the bundled corpus is used.",
    empty: str = "Write one prompt per line.",
) -> list[tuple[int, str]]:
    """Lines with their numbers, from 1. Only line feeds end a line: U+2028 may be part of a prompt.

    Args:
        what: What the lines are, for messages.
        absent, empty: What to do without the file, and with an empty one.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as err:
        near = (
            did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else None
        )
        raise DataError(
            f"The {what} file {str(path)!r} does not exist.",
            detail=near,
            hint=absent,
        ) from err
    except OSError as err:
        raise DataError(
            f"The {what} file {str(path)!r} cannot be read: {err.strerror}.",
            hint="Name a regular file that you may read.",
        ) from err
    if not data:
        raise DataError(f"The {what} file {str(path)!r} is empty.", hint=empty)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise DataError(
            f"The {what} file {str(path)!r} is not UTF-8: byte {data[err.start]:#04x} at offset {err.start}.",
            hint=f"Convert it: iconv -f latin1 -t utf-8 {path.name} > utf8-{path.name}",
        ) from err
    return [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1)]


def _require(items: list[Any], path: Path) -> None:
    if not items:
        raise DataError(
            f"The prompt file {str(path)!r} has no prompt: all of it is blank.",
            hint="Write one prompt per line.",
        )
