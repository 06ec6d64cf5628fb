"""What travels inside the page as one JSON: the document, the values behind the figures, the tokens.

It stands in `<script type="application/json" id="sinklens-run">`, so that a saved report can be read again,
and so that the page's own script needs no request. Arrays are base64 of little-endian numbers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sinklens.core.adjustable import Adjustable
from sinklens.core.canonical import plain
from sinklens.core.errors import DataError
from sinklens.core.figures import Heatmap, Intervals, Lines, Timeline
from sinklens.core.figures import Samples as SamplesFigure
from sinklens.core.head_strip import HeadStrip

from . import colour, text
from .samples import Counts

SCHEMA = "sinklens/report/1"
RUN_SCHEMA = "sinklens/run/1"
COMPARE_SCHEMA = "sinklens/compare/1"
BLOCK, COMPARE_BLOCK = "sinklens-run", "sinklens-compare"
_BLOCK = re.compile(rf'<script type="application/json" id="{BLOCK}">([^<]*)</script>')
MOST_VALUES = 1_000_000
"""A figure with more values is drawn but its values are not embedded (4 MB each as text)."""


def packed(values: Any, kind: str = "<f4") -> str:
    """An array as base64 of its little-endian bytes, row by row."""
    return base64.b64encode(np.ascontiguousarray(np.asarray(values), dtype=kind).tobytes()).decode("ascii")


def heatmap(figure: Heatmap) -> dict[str, Any] | None:
    """The values of a map, or None when there are too many (or none)."""
    values = np.asarray(figure.values, dtype=float)
    if values.ndim != 2 or not 0 < values.size <= MOST_VALUES:
        return None
    scale = colour.scale(values, log=figure.log, limits=figure.limits)
    return {
        "kind": "heatmap",
        "shape": list(values.shape),
        "values": packed(values),
        "unit": figure.unit,
        "labels": [figure.y_label, figure.x_label],
        "limits": [scale.low, scale.high],
        "log": figure.log,
    }


def lines(figure: Lines) -> dict[str, Any] | None:
    """The points of the curves, or None when there are too many."""
    if sum(len(s.x) for s in figure.series) > MOST_VALUES:
        return None
    return {
        "kind": "lines",
        "labels": [figure.x_label, figure.y_label],
        "series": [{"name": s.name, "x": packed(s.x, "<f8"), "y": packed(s.y, "<f8")} for s in figure.series],
    }


def intervals(figure: Intervals) -> dict[str, Any]:
    """The rows as a table."""
    numbers = ("value", "low", "high", "control", "control_low", "control_high")
    columns = ["group", "label", *numbers, "note"]
    return {
        "kind": "table",
        "columns": columns,
        "rows": [[getattr(row, name) for name in columns] for row in figure.rows],
    }


def timeline(figure: Timeline) -> dict[str, Any]:
    """The rows as a table; gaps and events in words."""
    rows = []
    for row in figure.rows:
        events = "; ".join(f"layer {event.layer}: {event.label}" for event in row.events)
        gaps = " ".join(map(str, row.gaps))
        rows.append([row.group, row.label, row.start, row.end, gaps, row.strength, events, row.note])
    columns = ["group", "label", "start", "end", "gaps", "strength", "events", "note"]
    return {"kind": "table", "columns": columns, "rows": rows}


def samples(figure: SamplesFigure, counts: Counts) -> dict[str, Any]:
    """Counts per threshold; see `Counts`."""
    return {
        "kind": "samples",
        "shape": list(counts.valid.shape),
        "thresholds": packed(counts.thresholds, "<f8"),
        "above": packed(counts.above, "<u4" if counts.valid.max(initial=0) > 65_535 else "<u2"),
        "wide": bool(counts.valid.max(initial=0) > 65_535),
        "valid": packed(counts.valid, "<u4"),
        "own": figure.threshold,
        "unit": "% of prompts",
        "labels": ["layer", "head"],
        "limits": [0.0, 100.0],
        "log": False,
    }


def heads(strips: Sequence[HeadStrip], prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Attention by head of some prompts, with the prompts' names and lengths; None without any."""
    if not strips:
        return None
    named = {item.prompt: prompts[item.prompt] for item in strips}
    return {
        "shape": list(strips[0].received.shape[:2]),
        "places": list(named),
        "names": {
            str(place): text.shorten(f"{prompt['index']}: {prompt['source']}", 60)
            for place, prompt in named.items()
        },
        "lengths": {str(place): int(prompt["n_tokens"]) for place, prompt in named.items()},
        "items": {
            str(item.prompt): {
                "positions": packed(item.positions, "<u4"),
                "received": packed(item.received),
            }
            for item in strips
        },
    }


def adjustable(item: Adjustable) -> dict[str, Any]:
    """What a rule reads; whole numbers as small as they fit."""
    return {
        "rule": item.rule,
        "arrays": {
            key: {"kind": kind, "data": packed(values, f"<{kind}")}
            for key, values in item.arrays.items()
            for kind in [_kind(np.asarray(values))]
        },
        "facts": _seen(item.facts),
        "words": _seen(list(item.words)),
        "headline": item.headline,
    }


def _seen(value: Any) -> Any:
    """Strings as the templates print them: nothing invisible, nothing reordered."""
    if isinstance(value, Mapping):
        return {key: _seen(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_seen(item) for item in value]
    return text.finalize(value)


def _kind(values: np.ndarray) -> str:
    if values.dtype.kind == "f":
        return f"f{values.dtype.itemsize}"
    if values.size and values.min() < 0:
        return "i4"
    return "u2" if values.max(initial=0) < 65_536 else "u4"


def tokens(prompts: Sequence[Mapping[str, Any]], budget: int = 400_000) -> dict[str, Any]:
    """The prompts' tokens, each (id, text) pair once; prompts beyond `budget` tokens in all are left out."""
    words: dict[tuple[int, str], int] = {}
    items: dict[str, str] = {}
    for place, prompt in enumerate(prompts):
        pieces = list(prompt.get("pieces") or ())
        budget -= len(pieces)
        if budget < 0 or not pieces:
            continue
        ids = list(prompt.get("token_ids") or [-1] * len(pieces))
        found = [
            words.setdefault((int(i), text.token(p)), len(words)) for i, p in zip(ids, pieces, strict=True)
        ]
        items[str(place)] = packed(found, "<u4")
    return {"words": [list(word) for word in words], "items": items}


def script_json(data: Any) -> str:
    """JSON that may stand inside a script element: `<`, `>`, `&` and everything beyond ASCII as escapes."""
    written = json.dumps(plain(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def script_hash(source: str) -> str:
    """The content security policy's name for an inline script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode("utf-8")).digest()).decode("ascii")


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The run's document from a report file.

    Raises:
        DataError: The file cannot be read, is not a sinklens report, or its data are damaged.
    """
    place = Path(path)
    try:
        source = place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(f"Cannot read the report {str(place)!r}: {reason}.") from error
    block = _BLOCK.search(source)
    hint = "Write it again from the run folder: sinklens report RUN"
    if block is None and f'<script type="application/json" id="{COMPARE_BLOCK}">' in source:
        raise DataError(
            f"{str(place)!r} is a comparison of runs, not the report of one run.",
            hint="Read a run's folder or its own report.html.",
        )
    if block is None:
        raise DataError(f"{str(place)!r} is not a sinklens report: it has no {BLOCK!r} data.", hint=hint)
    try:
        data = json.loads(block.group(1))
        document = data["document"]
        known = data["schema"] == SCHEMA and document["schema"] == RUN_SCHEMA
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"The data inside {str(place)!r} are damaged.", hint=hint) from error
    if not known:
        raise DataError(
            f"{str(place)!r} was written by another version of sinklens.",
            detail=f"Expected {SCHEMA} with {RUN_SCHEMA}, found {data['schema']} with {document['schema']}.",
            hint=f"Open it in a browser, or read it with {_writer(document)}.",
        )
    return document


def _writer(document: Any) -> str:
    """The version that wrote a report, as far as its manifest says."""
    manifest = document.get("manifest") if isinstance(document, dict) else None
    program = manifest.get("sinklens") if isinstance(manifest, dict) else None
    version = program.get("version") if isinstance(program, dict) else None
    return (
        f"sinklens {version}, which wrote it, or a newer one that knows its schema"
        if version
        else "its own version"
    )
