"""From the run's document to what the page shows. Decides words and order, draws nothing."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sinklens.core.figures import Tile

from . import names, text
from .marks import Marks, marks
from .numbers import brief, duration, number, size, with_unit
from .tables import Table, short_unit, table, with_interval

RESERVED = {
    "top",
    "map",
    "norms",
    "trust",
    "prompts",
    "methods",
    "mitigations",
    "manifest",
    "references",
    "strip",
    "sinklens-run",
    "ramp",
    "ramp-signed",
    "hatch",
    "help",
}

HEADLINES = {
    "sink": "Attention sink",
    "no-sink": "No attention sink",
    "untrusted": "Not trustworthy",
    "unknown": "Not measured",
}


@dataclass(frozen=True)
class Check:
    """One line of the self-check; `passed` is None when it was not run."""

    name: str
    passed: bool | None
    value: str
    limit: str
    detail: str

    @property
    def state(self) -> str:
        return "unknown" if self.passed is None else "passed" if self.passed else "failed"

    @property
    def sign(self) -> str:
        return {"passed": "✓", "failed": "✗", "unknown": "○"}[self.state]


@dataclass(frozen=True)
class Line:
    """A finding in one line of the first screen; `link` leads to its section."""

    title: str
    text: str
    link: str


@dataclass(frozen=True)
class Verdict:
    """What the first screen says.

    Attributes:
        status: `sink`, `no-sink`, `untrusted`, or what the document says.
        trusted: False greys everything out.
        trust: The trust line.
        lines: The findings that the sentence leaves out; none if a check failed.
    """

    status: str
    headline: str
    sentence: str
    rule: str
    trusted: bool
    trust: str
    lines: tuple[Line, ...] = ()


@dataclass(frozen=True)
class Section:
    """One finding.

    `rows` and `units` become a table; `parameters` and `summary` are (name, value) pairs; `marks` are those parts
    of the summary that are lists of places, `lists` those that are tables themselves.
    """

    id: str
    analyzer: str
    title: str
    status: str
    verdict: str
    reason: str
    notes: tuple[str, ...]
    parameters: tuple[tuple[str, str], ...]
    summary: tuple[tuple[str, str], ...]
    marks: tuple[Marks, ...]
    lists: tuple[tuple[str, Table], ...]
    rows: tuple[dict[str, Any], ...]
    units: dict[str, str]
    labels: dict[str, str]
    thresholds: tuple[str, str] | None

    @property
    def applicable(self) -> bool:
        return self.status != "not-applicable"


def checks(document: Mapping[str, Any]) -> tuple[Check, ...]:
    return tuple(
        Check(
            str(item.get("name", "")).replace("-", " ").replace("_", " "),
            None if item.get("passed") is None else bool(item["passed"]),
            _short(item.get("value")),
            _short(item.get("limit")),
            str(item.get("detail") or ""),
        )
        for item in document.get("checks") or ()
    )


def verdict(document: Mapping[str, Any]) -> Verdict:
    """The verdict, or, when a check failed, that there is none: no sentence overrides a check."""
    given = document.get("verdict") or {}
    found = checks(document)
    failed = [check.name for check in found if check.passed is False]
    status = "untrusted" if failed else str(given.get("status") or "untrusted")
    sentence = str(given.get("text") or "")
    if failed:
        names = ", ".join(failed)
        count = f"{len(failed)} of {len(found)} checks failed: {names}."
        written = sentence if given.get("status") == "untrusted" else ""
        sentence = written or f"{count} The measurement cannot be relied on, so there is no verdict."
        trust = count
    elif not found:
        trust = "No self-check was run, so nothing vouches for these numbers."
    else:
        skipped = sum(check.passed is None for check in found)
        passed = len(found) - skipped
        trust = (
            f"All {passed} checks passed." if not skipped else f"{passed} checks passed, {skipped} not run."
        )
    sentence = sentence or "The run gave no verdict."
    return Verdict(
        status,
        headline(status),
        sentence,
        str(given.get("rule") or ""),
        status != "untrusted",
        trust,
        () if status == "untrusted" else _lines(given),
    )


def _lines(given: Mapping[str, Any]) -> tuple[Line, ...]:
    listed = [line for line in given.get("lines") or () if isinstance(line, Mapping) and line.get("text")]
    return tuple(
        Line(str(line.get("title") or ""), str(line["text"]), str(line.get("analyzer") or ""))
        for line in listed
    )


def headline(status: str) -> str:
    """A verdict's status in words."""
    return HEADLINES.get(status, status.replace("-", " ").capitalize())


def warnings(document: Mapping[str, Any]) -> tuple[str, ...]:
    """Sentences that change how numbers are read: from the manifest and its parts; each once."""
    manifest = document.get("manifest") or {}
    parts = [manifest, *(value for value in manifest.values() if isinstance(value, Mapping))]
    listed = [part.get("warnings") for part in parts]
    sentences = [str(w) for warning in listed if isinstance(warning, list | tuple) for w in warning]
    return tuple(dict.fromkeys(sentences))


def chips(document: Mapping[str, Any]) -> tuple[str, ...]:
    """The model in a few words: `48 layers × 32 heads (4 KV)`, `128 experts, top 8`, ..."""
    model, manifest = document.get("model") or {}, document.get("manifest") or {}
    found = []
    if model.get("layers") and model.get("heads"):
        kv = model.get("kv_heads")
        grouped = f" ({kv} KV)" if kv and kv != model["heads"] else ""
        found.append(f"{model['layers']} layers × {model['heads']} heads{grouped}")
    if model.get("experts"):
        chosen = f", top {model['top_k']}" if model.get("top_k") else ""
        found.append(f"{model['experts']} experts{chosen}")
    if model.get("hidden_size"):
        found.append(f"width {number(model['hidden_size'])}")
    tracing = manifest.get("tracing") or {}
    path = tracing.get("attention_path") or manifest.get("attention_path")
    found += [str(model[key]) for key in ("dtype", "family") if model.get(key)]
    if isinstance(path, str):
        found.append(path)
    return tuple(found)


def sections(document: Mapping[str, Any], methods: Sequence[Mapping[str, Any]]) -> tuple[Section, ...]:
    """One section per finding, in the order of the document: that of the chain from sink to cause."""
    findings = document.get("findings") or {}
    titles = {str(m.get("name")): str(m.get("title") or "") for m in methods}
    taken = set(RESERVED)
    built = []
    for name, finding in findings.items():
        identifier = text.slug(name)
        while identifier in taken:
            identifier += "-finding"
        taken.add(identifier)
        spelled = name.replace("-", " ").replace("_", " ").capitalize()
        title = str(finding.get("title") or "") or titles.get(name) or spelled
        built.append(_section(name, identifier, title, finding))
    return tuple(built)


def _section(name: str, identifier: str, title: str, finding: Mapping[str, Any]) -> Section:
    rows = tuple(finding.get("rows") or ())
    parameters = finding.get("parameters") or {}
    reason = str(finding.get("reason") or "")
    summary = finding.get("summary") or {}
    labels = _texts(finding.get("labels"))
    units = _texts(finding.get("units"))
    called = {key: names.name(str(key), labels) for key in summary}
    of_heads = any({"layer", "head"} <= set(row) for row in rows)
    places = {
        k: found for k, v in summary.items() if (found := marks(str(k), v, called[k], of_heads=of_heads))
    }
    lists = {key: value for key, value in summary.items() if _is_table(value)}
    rest = {k: v for k, v in summary.items() if k not in places and k not in lists and v is not None}
    return Section(
        id=identifier,
        analyzer=name,
        title=title,
        status=str(finding.get("status") or "not-applicable"),
        verdict=str(finding.get("verdict") or ""),
        reason=reason or "the run gave no reason.",
        notes=tuple(str(note) for note in finding.get("notes") or ()),
        parameters=pairs(parameters, units, labels),
        summary=pairs(rest, units, labels),
        marks=tuple(places.values()),
        lists=tuple((called[key], built) for key in lists if (built := table(lists[key], units, labels))),
        rows=rows,
        units=units,
        labels=labels,
        thresholds=_thresholds(rows, parameters),
    )


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _thresholds(rows: Sequence[Mapping[str, Any]], parameters: Mapping[str, Any]) -> tuple[str, str] | None:
    """Starting values for the two threshold fields of tables with `value` and `ratio_to_median`."""
    if not any({"value", "ratio_to_median"} <= set(row) for row in rows):
        return None
    numbers = {k: v for k, v in parameters.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    ratio = next((v for k, v in numbers.items() if any(w in k for w in ("ratio", "relative", "median"))), 0)
    words = ("abs", "floor", "magnitude", "value", "minimum")
    floor = next((v for k, v in numbers.items() if any(w in k for w in words) and v is not ratio), 0)
    return f"{floor:g}", f"{ratio:g}"


def tile_views(
    tiles: Iterable[Tile], ids: Mapping[str, str], methods: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Tiles with their links resolved: to a section, to the method's definition and to its paper."""
    papers = {str(m.get("name")): text.web_link((m.get("reference") or {}).get("url")) for m in methods}
    views = []
    for tile in tiles:
        name = tile.link.removeprefix("#")
        target = (
            f"#{ids.get(name, text.slug(name))}" if name and "://" not in name and ":" not in name else None
        )
        views.append(
            {
                "tile": replace(tile, value=text.shorten(tile.value, 40)),
                "link": target,
                "method": f"#method-{text.slug(name)}" if name in papers else None,
                "paper": papers.get(name),
            }
        )
    return views


def manifest_groups(manifest: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The manifest as groups of (name, value): its own scalars first, then each part."""
    own = [(k, v) for k, v in manifest.items() if v is not None and not isinstance(v, Mapping)]
    groups = [("Run", [(words(key), reading(key, value)) for key, value in own])] if own else []
    for key, value in manifest.items():
        if isinstance(value, Mapping) and value:
            groups.append((words(key).capitalize(), [(words(k), reading(k, v)) for k, v in _flat(value)]))
    return groups


def _flat(part: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in part.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def reading(key: str, value: Any) -> str:
    """A value of the manifest as it is printed; its name tells bytes, seconds, seeds and commands."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if key.endswith("bytes"):
            return size(value)
        if key.endswith(("seconds", "_s")):
            return duration(float(value))
        if key.endswith("seed"):
            return str(value)
    if isinstance(value, list | tuple) and key in ("command", "argv", "command_line"):
        return shlex.join(str(v) for v in value)
    return _short(value, limit=2000)


def command(manifest: Mapping[str, Any]) -> str:
    """The command line that made the run, or ""."""
    value = next((manifest[key] for key in ("command", "command_line", "argv") if manifest.get(key)), "")
    return shlex.join(str(v) for v in value) if isinstance(value, list | tuple) else str(value)


def pairs(
    values: Mapping[str, Any],
    units: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
) -> tuple[tuple[str, str], ...]:
    """Names and values as they are printed, with the unit where one is known.

    An interval (`x_low`, `x_high`) stands behind its value.
    """
    known = units or {}
    inside = names.folded(values)
    shown = []
    for key, value in values.items():
        if key in inside:
            continue
        unit = known.get(key, "")
        percentage = isinstance(value, float) and unit.startswith("%")
        printed = with_unit(value, unit) if percentage else _short(value)
        printed = f"{printed} {short_unit(unit)}".rstrip()
        if (ends := names.ends(key, values)) is not None:
            printed = with_interval(printed, values[ends[0]], values[ends[1]], unit)
        shown.append((names.name(str(key), labels), printed))
    return tuple(shown)


def _texts(given: Any) -> dict[str, str]:
    """A mapping from text to text, whatever the document has there."""
    return {str(k): str(v) for k, v in given.items()} if isinstance(given, Mapping) else {}


def words(key: Any) -> str:
    return str(key).replace("_", " ")


def _short(value: Any, limit: int = 300) -> str:
    if isinstance(value, list | tuple):
        parts = [f"({_short(v)})" if isinstance(v, list | tuple) else _short(v) for v in value]
        return text.shorten(", ".join(parts), limit) or "none"
    if isinstance(value, Mapping):
        if any(isinstance(part, Mapping | list) for part in value.values()):
            return text.shorten(json.dumps(value, ensure_ascii=False, default=str), limit)
        return (
            text.shorten(", ".join(f"{key}: {_short(part)}" for key, part in value.items()), limit) or "none"
        )
    return text.shorten(value, limit) if isinstance(value, str) else brief(value)
