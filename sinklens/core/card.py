"""A few sentences and a table as static HTML: how objects show themselves in a notebook.

No scripts, no sheets, styles inline, so that it survives notebook sanitizers and both themes; everything is escaped.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

SOFT = "opacity:.72"
_BOX = (
    "max-width:900px;border:1px solid rgba(127,127,127,.35);border-radius:6px;padding:10px 14px;"
    "overflow-wrap:anywhere"
)
_CELL = "padding:1px 12px 1px 0;text-align:left"
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def card(
    title: str,
    sentence: str,
    notes: Sequence[str] = (),
    rows: Sequence[Mapping[str, Any]] = (),
    units: Mapping[str, str] | None = None,
    *,
    most: int = 10,
    below: str = "",
) -> str:
    """The card, well under 100 KB.

    Args:
        sentence: The answer.
        rows: Table rows; the first `most` are shown, and how many there are.
        units: By column, shown under its name.
        below: HTML that is put below the table as it is.
    """
    parts = [
        f'<div style="font-weight:600">{_text(title)}</div>',
        f'<div style="margin:4px 0">{_text(sentence)}</div>',
    ]
    parts += [f'<div style="font-size:85%;{SOFT}">▲ {_text(note)}</div>' for note in list(notes)[:8]]
    if rows:
        parts.append(_table(rows[:most], units or {}))
        if len(rows) > most:
            parts.append(f'<div style="font-size:80%;{SOFT}">The first {most} of {len(rows)} rows.</div>')
    return f'<div style="{_BOX}">{"".join(parts)}{below}</div>'


def _table(rows: Sequence[Mapping[str, Any]], units: Mapping[str, str]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))[:16]
    head = "".join(
        f'<th style="{_CELL}">{_text(c)}<br><span style="font-weight:400;font-size:85%;{SOFT}">'
        f"{_text(units.get(c, ''))}</span></th>"
        for c in columns
    )
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{_text(_shown(row.get(c)))}</td>' for c in columns) + "</tr>"
        for row in rows
    )
    return f'<table style="font-size:85%"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _text(value: str, most: int = 600) -> str:
    """Escaped, with invisible characters spelled out, and no longer than a few lines."""
    cut = value if len(value) <= most else value[: most - 1] + "…"
    return escape("".join(_spelled(char) for char in cut))


def _spelled(char: str) -> str:
    if unicodedata.category(char) not in _HIDDEN:
        return char
    return " " if char in "\n\t" else char.encode("unicode_escape").decode()
