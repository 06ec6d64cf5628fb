"""From what the user typed to pictures with their questions: files, folders, JSONL lines, chat messages, memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from sinklens.core.errors import DataError, UsageError
from sinklens.core.suggest import did_you_mean

from ..files import numbered_lines
from ..sources import Message, is_message
from .pictures import VIDEOS, Reference, refer

LINE = '{"image": "cat.png", "question": "What is it?"}'
PICTURE_KEYS, MASK_KEYS = ("images", "image"), ("masks", "mask")
TEXT_KEYS = ("text", "messages", "question")


@dataclass(frozen=True, eq=False)
class VisualDocument:
    """Pictures and what is asked about them, before the processor.

    Attributes:
        content: The text after the pictures (or around their placeholders), or chat messages.
        masks: Per picture where its objects are, or None.
        answer: What is known to be right; it is not fed.
    """

    pictures: tuple[Reference, ...]
    content: str | list[Message]
    source: str
    domain: str = ""
    answer: str | None = None
    question: str | None = None
    masks: tuple[Reference | None, ...] = ()


@dataclass(frozen=True)
class VisualSource:
    """All documents of a source, in its own order; `name` is never a path of the machine."""

    name: str
    documents: list[VisualDocument]
    notes: tuple[str, ...] = field(default=())


def holds_pictures(source: object) -> bool:
    """Whether prompts given as `source` have pictures: a JSONL file whose first line has, or such rows in memory."""
    if isinstance(source, PathLike):
        source = fspath(source)
    if isinstance(source, str):
        path = Path(source)
        if path.suffix.lower() != ".jsonl" or not path.is_file():
            return False
        try:
            first = next((line for _, line in numbered_lines(path) if line.strip()), "")
            return _row_has_pictures(json.loads(first))
        except (ValueError, DataError):
            return False  # the reader of texts says what is wrong with it
    if isinstance(source, Sequence) and not isinstance(source, (bytes, bytearray)) and len(source):
        return _row_has_pictures(source[0])
    return False


def _row_has_pictures(row: Any) -> bool:
    if isinstance(row, Mapping):
        return any(key in row for key in PICTURE_KEYS) or _row_has_pictures(row.get("messages"))
    return isinstance(row, list) and any(
        isinstance(part, dict) and str(part.get("type", "")).startswith("image")
        for message in row
        if is_message(message) and isinstance(message["content"], list)
        for part in message["content"]
    )


def read_documents(images: object, prompts: object, question: str | None) -> VisualSource:
    """The documents behind `--images` with `--question`, or behind `--prompts` with pictures.

    Args:
        images: A file, a folder, a JSONL file, one picture in memory, or a list of pictures, of lists of pictures
            (several in one prompt) or of rows; None if `prompts` has them.
        question: Asked about every picture that has no question of its own.

    Raises:
        DataError: Something cannot be read; the message names the line or file.
        UsageError: `images` is of a type that cannot be pictures.
    """
    source = images if images is not None else prompts
    if isinstance(source, str | PathLike):
        text = fspath(source)
        if text.lower().endswith(".jsonl"):
            return _with_question(_read_jsonl(Path(text)), question)
        return _with_question(_read_path(text), question)
    items = list(source) if isinstance(source, list | tuple) else [source]
    if all(item is None for item in items):
        raise DataError("The list of pictures is empty.", detail="images=[] asks for nothing.")
    documents = [_from_memory(item, index) for index, item in enumerate(items)]
    return _with_question(VisualSource("memory", documents), question)


def _with_question(source: VisualSource, question: str | None) -> VisualSource:
    if question is None:
        return source
    documents = [
        document if document.content else replace(document, content=question, question=question)
        for document in source.documents
    ]
    return replace(source, documents=documents)


def _read_path(text: str) -> VisualSource:
    """One picture, or every picture of a folder in the order of their names."""
    path = Path(text)
    if not path.is_dir():
        reference = refer(text, text)
        return VisualSource(reference.name, [VisualDocument((reference,), "", reference.name)])
    known = _extensions()
    files = sorted(item for item in path.iterdir() if item.is_file() and not item.name.startswith("."))
    pictures = [item for item in files if item.suffix.lower() in known]
    others = len(files) - len(pictures)
    if not pictures:
        raise DataError(
            f"The folder {text!r} has no picture.",
            detail=_why_none(path, files),
            hint="Give a folder that holds PNG or JPEG files itself (folders inside it are not searched).",
        )
    notes = (
        ()
        if not others
        else (f"{others} files of the folder {path.name!r} are no pictures and were left out.",)
    )
    documents = [VisualDocument((Reference(item, item.name),), "", item.name) for item in pictures]
    return VisualSource(f"folder {path.resolve().name}", documents, notes)


def _why_none(path: Path, files: list[Path]) -> str:
    if not files:
        folders = sum(item.is_dir() for item in path.iterdir())
        return f"It holds {folders} folders and no file." if folders else "It is empty."
    if any(item.suffix.lower() in VIDEOS for item in files):
        return "It holds videos; sinklens reads pictures only."
    found = sorted({item.suffix.lower() or "(no extension)" for item in files})
    return f"It holds {len(files)} files with {', '.join(found[:5])}."


def _extensions() -> frozenset[str]:
    from PIL import Image

    return frozenset(Image.registered_extensions()) - {".pdf", ".ps", ".eps", ".mpg", ".mpeg"}


def _read_jsonl(path: Path) -> VisualSource:
    lines = [(number, line) for number, line in numbered_lines(path) if line.strip()]
    documents = []
    for number, line in lines:
        where = f"{path.name}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as err:
            raise DataError(
                f"{where} is not valid JSON: {err.msg} at column {err.colno}.",
                hint=f"JSONL has one complete object per line, for instance {LINE}",
            ) from err
        documents.append(_from_row(row, where, path.parent))
    if not documents:
        raise DataError(f"The file {path.name!r} has no line with a picture: all of it is blank.", hint=LINE)
    return VisualSource(path.name, documents)


def _from_row(row: Any, where: str, beside: Path | None) -> VisualDocument:
    """A row of a JSONL file, or a mapping in memory."""
    if not isinstance(row, Mapping):
        raise DataError(
            f"{where} is not a JSON object but {type(row).__name__}.", hint=f"A line looks like {LINE}"
        )
    key = next((key for key in PICTURE_KEYS if key in row), None)
    items = _as_list(row[key]) if key is not None else []
    content = next((row[key] for key in TEXT_KEYS if row.get(key)), "")
    if isinstance(content, list):
        content, items = _messages(content, items, where)
    if not items:
        near = did_you_mean("image", [str(key) for key in row])
        raise DataError(
            f"{where} has no picture.",
            detail=near or f"Fields found: {', '.join(map(repr, row)) or 'none'}.",
            hint=f"Every line needs one, for instance {LINE}; texts alone go into a file of their own.",
        )
    if not isinstance(content, str | list):
        raise DataError(f"{where}: the question is {type(content).__name__}, not text.", hint=LINE)
    pictures = tuple(refer(item, f"{where}, picture {i}", beside) for i, item in enumerate(items))
    answer, domain, question = (row.get(name) for name in ("answer", "domain", "question"))
    return VisualDocument(
        pictures,
        content,
        where,
        domain if isinstance(domain, str) else "",
        answer if isinstance(answer, str) else None,
        question if isinstance(question, str) else content if isinstance(content, str) else None,
        _masks(row, len(pictures), where, beside),
    )


def _masks(
    row: Mapping[str, Any], count: int, where: str, beside: Path | None
) -> tuple[Reference | None, ...]:
    key = next((key for key in MASK_KEYS if row.get(key) is not None), None)
    if key is None:
        return (None,) * count
    items = _as_list(row[key])
    if len(items) != count:
        raise DataError(
            f"{where} has {count} pictures and {len(items)} masks.", hint="Give null for a missing mask."
        )
    return tuple(
        None if item is None else refer(item, f"{where}, mask {i}", beside) for i, item in enumerate(items)
    )


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _messages(content: list[Any], items: list[Any], where: str) -> tuple[list[Message], list[Any]]:
    """Messages in which pictures are bare `{"type": "image"}` parts, and the pictures they named, in order."""
    found: list[Any] = []
    messages: list[Message] = []
    for message in content:
        if not is_message(message):
            raise DataError(
                f"{where} holds something that is no chat message: {str(message)[:60]}",
                hint='A message looks like {"role": "user", "content": "Hello"}.',
            )
        parts = message["content"]
        if isinstance(parts, list):
            parts = [_part(part, found, where) for part in parts]
        messages.append({**message, "content": parts})
    named = [item for item in found if item is not None]
    if named and items:
        raise DataError(f"{where} names pictures twice: in its messages and beside them.")
    if named and len(named) < len(found):
        raise DataError(f"{where}: {len(found) - len(named)} image parts of its messages name no picture.")
    if not named and found and len(found) != len(items):
        raise DataError(f"{where} has {len(found)} image parts and {len(items)} pictures.")
    if not found and items:
        raise DataError(
            f"{where} has pictures, but its messages have no image part.",
            hint='Put {"type": "image"} where the picture stands in the message.',
        )
    return messages, named or items


def _part(part: Any, found: list[Any], where: str) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "video":
        raise DataError(f"{where} holds a video; sinklens reads pictures only.")
    if kind not in ("image", "image_url"):
        return part
    value = next(
        (part[key] for key in ("image", "path", "url", "image_url") if part.get(key) is not None), None
    )
    found.append(value.get("url") if isinstance(value, dict) else value)
    return {"type": "image"}


def _from_memory(item: Any, index: int) -> VisualDocument:
    where = f"memory#{index}"
    if isinstance(item, Mapping):
        return _from_row(item, where, None)
    if _row_has_pictures(item):
        return _from_row({"messages": item}, where, None)
    if isinstance(item, list | tuple):
        several = _pictures(item, where)
        return VisualDocument(several, "", where, masks=(None,) * len(several))
    if item is None or isinstance(item, bool | int | float):
        raise UsageError(
            f"{where} cannot be a picture: it is {type(item).__name__}.",
            hint="Give paths, PIL images or arrays: images=['cat.png', image]",
        )
    return VisualDocument(_pictures([item], where), "", where)


def _pictures(items: Iterable[Any], where: str) -> tuple[Reference, ...]:
    found = tuple(refer(item, f"{where}, picture {i}") for i, item in enumerate(items))
    if not found:
        raise DataError(f"{where} is an empty list of pictures.")
    return found
