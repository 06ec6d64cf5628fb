"""`--fail-if`: conditions on the JSON document, for use in a training or release pipeline."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterable
from dataclasses import fields
from typing import Any

from sinklens.analyzers import registry
from sinklens.analyzers.base import FINDING_FIELDS
from sinklens.core.errors import GateError, UsageError
from sinklens.core.suggest import did_you_mean

from .run import MODEL_FIELDS
from .verdict import Verdict

_FORM = re.compile(r"^\s*([\w.\-]+)\s*(>=|<=|==|!=|>|<)\s*(\S.*?)\s*$")
_COMPARE = {
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}


def check_gate(expression: str, document: dict[str, Any]) -> None:
    """Raise if a condition holds.

    Args:
        expression: `path operator value`; the path is `finding.field` with the field looked up in the finding's
            summary, then in the finding (`primary-sinks.sink_rate > 90`, `super-experts.rows == 0`), or
            `verdict.status == sink`. A list counts as its length.

    Raises:
        GateError: The condition holds.
        UsageError: The expression or its path cannot be read.
    """
    path, sign, wanted = parse_gate(expression)
    value = _lookup(path, document)
    if isinstance(value, list):
        value = len(value)  # rows, heads, dims, ...: how many
    if value is None:
        raise UsageError(f"--fail-if: {path} has no value in this run.", hint="See the document with --json.")
    if isinstance(value, str | bool) and sign not in ("==", "!="):
        raise UsageError(
            f"--fail-if: {path} is {str(value)!r}, which is neither larger nor smaller than {wanted}.",
            hint="Compare it with == or !=.",
        )
    if _COMPARE[sign](*_alike(value, wanted, path)):
        raise GateError(f"--fail-if: {path} is {value}, and the condition is {path} {sign} {wanted}.")


def check_paths(expressions: Iterable[str], analyzers: Iterable[str], others: Collection[str] = ()) -> None:
    """Refuse conditions that no outcome of this run can meet, before anything is run.

    Args:
        analyzers: Names of the analyzers that will run.
        others: Names of further findings, of which the fields are not known before.

    Raises:
        UsageError: An expression cannot be read, or its finding or field will not be there.
    """
    found = {name: _fields_of(name) for name in ("verdict", "model", *analyzers)}
    for expression in expressions:
        path = parse_gate(expression)[0]
        head, _, field = path.partition(".")
        head = head.replace("_", "-")
        if head in others:
            continue
        if head not in found:
            known = [*found, *others]
            hint = did_you_mean(head, known) or f"There are: {', '.join(known)}."
            raise UsageError(f"--fail-if: this run will have no {head!r}.", detail=hint)
        known = found[head]
        if known is not None and field not in known:
            raise _no_field(head, field, known)


def _fields_of(head: str) -> list[str] | None:
    """What can be asked of a part of the document; None where it is not known before a run."""
    if head == "verdict":
        return [field.name for field in fields(Verdict)]
    if head == "model":
        return list(MODEL_FIELDS)
    summarised = registry[head].summarises
    return None if summarised is None else [*summarised, *FINDING_FIELDS]


def _no_field(head: str, field: str, known: Iterable[str]) -> UsageError:
    detail = did_you_mean(field, known) if field else None
    return UsageError(
        f"--fail-if: {head} has no {field!r}."
        if field
        else f"--fail-if: {head} is no number; name a field of it.",
        detail=detail or f"It has: {', '.join(known)}.",
    )


def parse_gate(expression: str) -> tuple[str, str, str]:
    """Path, operator and value of an expression."""
    match = _FORM.match(expression)
    if match is None:
        raise UsageError(
            f"--fail-if cannot read {expression!r}.",
            detail="Expected: path operator value, with one of > < >= <= == !=.",
            hint='For instance: --fail-if "primary-sinks.sink_rate > 90"',
        )
    return match[1], match[2], match[3]


def _lookup(path: str, document: dict[str, Any]) -> Any:
    head, _, field = path.partition(".")
    head = head.replace("_", "-")
    places: list[dict[str, Any]] = []
    known = [*document["findings"], "verdict", "model"]
    if head in document["findings"]:
        finding = document["findings"][head]
        places = [finding["summary"], finding]
    elif head in ("verdict", "model"):
        places = [document[head]]
    elif head in registry:
        raise UsageError(
            f"--fail-if: {head} took no part in this run.",
            hint="Name it in --analyzers; analyzers of pictures need prompts with pictures."
            if registry[head].of_pictures
            else "Name it in --analyzers.",
        )
    else:
        raise UsageError(
            f"--fail-if: there is no {head!r}.", detail=did_you_mean(head, known) or f"There are: {known}."
        )
    for place in places:
        if field in place:
            return place[field]
    if places and places[0] == {} and places[-1].get("status") == "not-applicable":
        raise UsageError(
            f"--fail-if: {head} has no {field!r} here, because it does not apply: {places[-1].get('reason')}",
            hint=f"Ask for its state instead: {head}.status == not-applicable",
        )
    raise _no_field(head, field, sorted({name for place in places for name in place}))


def _alike(value: Any, wanted: str, path: str) -> tuple[Any, Any]:
    if isinstance(value, bool):
        return str(value).lower(), wanted.strip("\"'").lower()
    if isinstance(value, str):
        return value, wanted.strip("\"'")
    try:
        return float(value), float(wanted)
    except (TypeError, ValueError):
        raise UsageError(f"--fail-if: {path} is the number {value}; {wanted!r} is none.") from None
