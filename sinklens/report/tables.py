"""Rows of a finding as a table: which columns, how each value reads, and the same as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from . import text
from .names import ends, folded, name
from .numbers import with_unit

SHOWN, KEPT = 20, 500
"""Rows shown at once, and rows in the page at all; the downloads have every row."""

_UNIT_LENGTH = 18
_DATA_LINK_BYTES = 24_000
_INDICES = {"layer", "head", "position", "dim", "expert", "token_id", "row", "col", "image", "prompt"}


@dataclass(frozen=True)
class Column:
    """A column; a short unit stands in its header, a long one below the table."""

    key: str
    unit: str
    numeric: bool
    label: str

    @property
    def header_unit(self) -> str:
        return short_unit(self.unit) if self.unit != self.label else ""

    @property
    def explained(self) -> str:
        return self.unit if len(self.unit) > _UNIT_LENGTH else ""


@dataclass(frozen=True)
class Cell:
    """What is shown; `link` leads to a place in the page; `token` asks for a frame and its own direction.

    `header` makes it the name of its row; `verdict` is the status whose shape stands before the words.
    """

    shown: str
    numeric: bool = False
    token: bool = False
    link: str | None = None
    header: bool = False
    verdict: str | None = None


@dataclass(frozen=True)
class Row:
    """`filters` are the numbers a threshold can act on: absolute value and ratio."""

    cells: tuple[Cell, ...]
    filters: tuple[float, float] | None = None


@dataclass(frozen=True)
class Table:
    """At most `KEPT` rows of `total`; `csv_link` is a `data:` address for small tables."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    total: int
    csv_link: str | None

    @property
    def first(self) -> tuple[Row, ...]:
        return self.rows[:SHOWN]

    @property
    def rest(self) -> tuple[Row, ...]:
        return self.rows[SHOWN:]

    @property
    def indexed(self) -> bool:
        """Whether a column counts from zero, which the caption must then say."""
        return any(column.key in _INDICES for column in self.columns)


def table(
    rows: Sequence[dict[str, Any]], units: dict[str, str], labels: Mapping[str, str] | None = None
) -> Table | None:
    """The rows as a table, or None if there are none. Columns: all keys, in order of appearance.

    `x_low` and `x_high` (or `x_ci_low`, ...) beside `x` are no columns of their own: the cells of `x` carry the
    interval.
    """
    if not rows:
        return None
    keys = list(dict.fromkeys(key for row in rows for key in row))
    inside = folded(keys)
    columns = tuple(
        Column(
            key,
            units.get(key, ""),
            _is_numeric([row.get(key) for row in rows]),
            _column_name(key, keys, labels),
        )
        for key in keys
        if key not in inside
    )
    kept = tuple(_row(row, columns) for row in rows[:KEPT])
    written = as_csv(rows)
    link = "data:text/csv;charset=utf-8," + quote(written) if len(written) < _DATA_LINK_BYTES else None
    return Table(columns, kept, len(rows), link)


def _column_name(key: str, keys: Sequence[str], labels: Mapping[str, str] | None) -> str:
    return name(key, labels) + (" (interval)" if ends(key, keys) else "")


def with_interval(shown: str, low: Any, high: Any, unit: str) -> str:
    """A value with its interval, if there is one: `24.6 (20.1 to 28.8)`."""
    if not all(isinstance(end, int | float) and math.isfinite(end) for end in (low, high)):
        return shown
    return f"{shown} ({with_unit(float(low), unit)} to {with_unit(float(high), unit)})"


def short_unit(unit: str) -> str:
    """The unit if it fits behind a number; of a longer percentage, the sign."""
    return unit if len(unit) <= _UNIT_LENGTH else "%" if unit.startswith("%") else ""


def _is_numeric(values: list[Any]) -> bool:
    known = [value for value in values if value is not None]
    return bool(known) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in known)


def _row(row: dict[str, Any], columns: tuple[Column, ...]) -> Row:
    place = None
    if isinstance(row.get("layer"), int) and isinstance(row.get("head"), int):
        place = f"#L{row['layer']}H{row['head']}"
    cells = [_cell(row.get(c.key), c, place if c.key in ("layer", "head") else None) for c in columns]
    cells = [_widened(cell, c, row) for cell, c in zip(cells, columns, strict=True)]
    return Row(tuple(cells), _filters(row))


def _widened(cell: Cell, column: Column, row: dict[str, Any]) -> Cell:
    """The cell with its interval, if the row has one."""
    pair = ends(column.key, row)
    if pair is None:
        return cell
    return replace(cell, shown=with_interval(cell.shown, row[pair[0]], row[pair[1]], column.unit))


def _cell(value: Any, column: Column, link: str | None) -> Cell:
    if isinstance(value, str) and "token" in column.key:
        return Cell(text.token(value), token=True)
    if isinstance(value, list | dict):
        return Cell(text.shorten(json.dumps(value, ensure_ascii=False), 120))
    if isinstance(value, str):
        return Cell(text.shorten(value, 400))
    plain = column.key in _INDICES and isinstance(value, int) and not isinstance(value, bool)
    return Cell(str(value) if plain else with_unit(value, column.unit), numeric=column.numeric, link=link)


def _filters(row: dict[str, Any]) -> tuple[float, float] | None:
    value, ratio = row.get("value"), row.get("ratio_to_median")
    if not isinstance(value, int | float) or not isinstance(ratio, int | float):
        return None
    return (abs(value), float(ratio)) if math.isfinite(value) and math.isfinite(ratio) else None


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as CSV with full precision.

    A text cell that a spreadsheet would run as a formula (`=HYPERLINK(...)`) gets a leading apostrophe;
    single characters, such as the token `=`, cannot run and stay exact.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(keys)
    for row in rows:
        writer.writerow([_csv_value(row.get(key)) for key in keys])
    return out.getvalue().encode("utf-8", "backslashreplace").decode("utf-8")


def _csv_value(value: Any) -> Any:
    if isinstance(value, str) and len(value) > 1 and value[0] in "=+-@\t\r":
        return "'" + value
    if isinstance(value, list | dict):
        return json.dumps(value)
    return "" if value is None else value
