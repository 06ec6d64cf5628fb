"""`--fail-if`: conditions on the JSON document, for use in a training or release pipeline."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any

from sinklens.analyzers import registry
from sinklens.core.errors import GateError, UsageError
from sinklens.core.suggest import did_you_mean

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
    if _COMPARE[sign](*_alike(value, wanted, path)):
        raise GateError(f"--fail-if: {path} is {value}, and the condition is {path} {sign} {wanted}.")


def check_path(path: str, analyzers: Sequence[str]) -> None:
    """Refuse a path whose finding this run will not have, before anything is run.

    Args:
        analyzers: Names of the analyzers that will run.
    """
    head = path.partition(".")[0].replace("_", "-")
    known = ["verdict", "model", *analyzers]
    if head not in known:
        hint = did_you_mean(head, known) or f"There are: {', '.join(known)}."
        raise UsageError(f"--fail-if: this run will have no {head!r}.", detail=hint)


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
    fields = sorted({name for place in places for name in place})
    detail = did_you_mean(field, fields) or f"It has: {', '.join(fields)}."
    raise UsageError(f"--fail-if: {head} has no {field!r}.", detail=detail)


def _alike(value: Any, wanted: str, path: str) -> tuple[Any, Any]:
    if isinstance(value, bool):
        return str(value).lower(), wanted.strip("\"'").lower()
    if isinstance(value, str):
        return value, wanted.strip("\"'")
    try:
        return float(value), float(wanted)
    except (TypeError, ValueError):
        raise UsageError(f"--fail-if: {path} is the number {value}; {wanted!r} is none.") from None
