"""Published values beside the run's own: what the page prints of the document's `references`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import text
from .numbers import brief, percent

_LEAD = {
    "this model": "What others published about this model, beside what this run measured.",
    "family": "Nothing is known to be published about this model; these are values of its relatives.",
}
_NOTHING = "No published value is known for this model or its family."
_VERIFIED = {"measured", "code", "paper"}


@dataclass(frozen=True)
class Value:
    """One published value.

    Attributes:
        here: What the run measured, "" where it has no such value.
        sure: Whether it was measured by us or read at its source; others are set in grey.
        differences: How the protocols differ, in words.
    """

    model: str
    title: str
    published: str
    here: str
    remark: str
    status: str
    sure: bool
    source: str
    where: str
    url: str | None
    differences: tuple[str, ...]


@dataclass(frozen=True)
class Beside:
    """The section: a sentence and its rows. `compared` tells whether any row has a value of the run."""

    lead: str
    rows: tuple[Value, ...]

    @property
    def compared(self) -> bool:
        return any(row.here for row in self.rows)


def beside(document: Mapping[str, Any]) -> Beside | None:
    """The section, or None for documents that were written without it."""
    given = document.get("references")
    if not isinstance(given, Mapping):
        return None
    rows = tuple(_value(row) for row in given.get("rows") or () if isinstance(row, Mapping))
    return Beside(_LEAD.get(str(given.get("match")), "Values others published.") if rows else _NOTHING, rows)


def _value(row: Mapping[str, Any]) -> Value:
    unit = str(row.get("unit") or "")
    status = str(row.get("status") or "")
    return Value(
        model=str(row.get("model") or ""),
        title=str(row.get("title") or row.get("quantity") or ""),
        published=_shown(row.get("published"), unit),
        here="" if row.get("here") is None else _shown(row["here"], unit),
        remark=str(row.get("remark") or ""),
        status=str(row.get("status_words") or status),
        sure=status in _VERIFIED,
        source=str(row.get("source") or ""),
        where=str(row.get("where") or ""),
        url=text.web_link(row.get("url")),
        differences=tuple(str(words) for words in row.get("differences") or ()),
    )


def _shown(value: Any, unit: str) -> str:
    """A number with its unit, or a list, as a cell."""
    if isinstance(value, list | tuple):
        return text.shorten(", ".join(_shown(part, "") for part in value), 200) or "none"
    if isinstance(value, str):
        return text.shorten(value, 200)
    if unit.startswith("%") and isinstance(value, float):
        return f"{percent(value)} {unit}"
    return f"{brief(value)} {unit}".rstrip()
