"""From what the user typed to documents: which reader a source belongs to, and the in-memory readers."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

from sinklens.core.errors import DataError, UsageError
from sinklens.core.suggest import did_you_mean

Message = dict[str, Any]
Content = str | tuple[int, ...] | list[Message]

FORMS = "a .txt or .jsonl file, file.jsonl:field, corpus:NAME or hf:dataset[:config[:split[:field]]]"
EXTENSIONS = (".txt", ".jsonl")


@dataclass(frozen=True)
class Document:
    """One unit of input before tokenisation: text, token ids, or chat messages."""

    content: Content
    source: str
    domain: str = ""


@dataclass(frozen=True)
class Source:
    """All documents of a source, in its own order.

    Attributes:
        name: What the manifest calls it; never a path of the machine.
        groups: Whether documents are sampled evenly over their domains.
        notes: Sentences that belong into the warnings of the prompt set.
    """

    name: str
    documents: list[Document]
    groups: bool = False
    notes: tuple[str, ...] = ()

    @property
    def given_ids(self) -> bool:
        """Whether the documents are token ids already. A source never mixes them with text."""
        return isinstance(self.documents[0].content, tuple)


def read_source(source: object, *, n: int | None) -> Source:
    """The documents behind `source`; see `load_prompts` for what it may be.

    Args:
        n: How many prompts are wanted, so that a hub dataset is not read to its end.

    Raises:
        DataError: If it cannot be found or read; the message names the line or byte.
        UsageError: If `source` is of a type that cannot be prompts.
    """
    from .corpus import CORPORA, read_corpus
    from .files import read_jsonl, read_text
    from .hub import read_hub

    if source is None:
        return read_corpus("mixed")
    if isinstance(source, PathLike):
        source = fspath(source)
    if isinstance(source, str):
        if source in CORPORA:
            return read_corpus(source)
        prefix, _, rest = source.partition(":")
        readers: dict[str, Callable[[str], Source]] = {
            "corpus": read_corpus,
            "hf": lambda name: read_hub(name, n=n),
        }
        if prefix in readers:
            return readers[prefix](rest)
        path, field = split_field(source)
        if path.lower().endswith(".jsonl"):
            return read_jsonl(path, field)
        if path.lower().endswith(".txt"):
            return read_text(path)
        raise _unreadable(source, CORPORA)
    if isinstance(source, Sequence) and not isinstance(source, (bytes, bytearray)):
        return read_memory(source)
    raise UsageError(
        f"Prompts cannot be read from an object of type {type(source).__name__}.",
        detail=f"Expected {FORMS}, or a list of strings or of token ids.",
        hint='Try: load_prompts(["The quick brown fox"], tokenizer)',
    )


def split_field(source: str) -> tuple[str, str]:
    """`data.jsonl:body` as `("data.jsonl", "body")`; the field is `text` if none is named."""
    head, mark, field = source.rpartition(".jsonl:")
    return (head + ".jsonl", field or "text") if mark else (source, "text")


def read_memory(items: Sequence[Any]) -> Source:
    """A list of strings, of token id lists (or 1-D tensors), or of chat message lists."""
    if not items:
        raise DataError(
            "The list of prompts is empty.", hint='Try: load_prompts(["The quick brown fox"], tokenizer)'
        )
    documents = [Document(_content(item, i), f"memory#{i}") for i, item in enumerate(items)]
    kinds = {isinstance(document.content, tuple) for document in documents}
    if len(kinds) > 1:
        raise DataError(
            "The list of prompts mixes text and token ids.",
            hint="Load them as two prompt sets, or tokenise the text.",
        )
    return Source("memory", documents)


def _content(item: Any, index: int) -> Content:
    if isinstance(item, str):
        return item
    if hasattr(item, "tolist"):  # tensors and arrays
        item = item.tolist()
    if isinstance(item, Sequence) and item:
        if all(is_message(part) for part in item):
            return [dict(part) for part in item]
        if all(_is_id(part) for part in item):
            return tuple(int(part) for part in item)
    raise DataError(
        f"Prompt {index} of the list cannot be used.",
        detail=f"Expected a string, token ids (integers from 0) or chat messages; found {_shown(item)}.",
        hint="All ids of a prompt go into one flat list: [[1, 15, 27], [1, 9]].",
    )


def _is_id(part: Any) -> bool:
    return isinstance(part, numbers.Integral) and not isinstance(part, bool) and int(part) >= 0


def is_message(part: Any) -> bool:
    """Whether `part` looks like `{"role": ..., "content": ...}`."""
    return isinstance(part, dict) and isinstance(part.get("role"), str) and "content" in part


def _shown(item: Any) -> str:
    text = f"{type(item).__name__} {item!r}"
    return text if len(text) <= 60 else text[:59] + "…"


def _unreadable(source: str, corpora: dict[str, str]) -> DataError:
    """The error for a string that no reader claims: a wrong extension, or a name nobody knows."""
    from pathlib import Path

    path = Path(source)
    if path.exists() or path.suffix or len(path.parts) > 1:
        what = "is a folder" if path.is_dir() else f"has the extension {path.suffix or '(none)'!r}"
        return DataError(
            f"Prompts cannot be read from {source!r}: it {what}.",
            detail=f"Expected {FORMS}.",
            hint="Rename it to .txt (one prompt per line) or .jsonl (one object with a text field per line).",
        )
    return DataError(
        f"Unknown source of prompts {source!r}.",
        detail=did_you_mean(source, corpora) or f"Expected {FORMS}.",
        hint=f"Bundled corpora: {', '.join(corpora)}.",
    )
