"""`--fail-if`: conditions on the JSON document, for use in a training or release pipeline."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any, get_args

from sinklens.analyzers import registry
from sinklens.analyzers.base import FINDING_FIELDS, TRUTH, Status
from sinklens.core.errors import GateError, UsageError
from sinklens.core.suggest import did_you_mean

from .run import MODEL_FIELDS
from .verdict import State, Verdict

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


def check_paths(
    expressions: Iterable[str],
    analyzers: Iterable[str],
    others: Mapping[str, Mapping[str, Collection[str]]] | None = None,
) -> None:
    """Refuse conditions that no outcome of this run can meet, before anything is run.

    Args:
        analyzers: Names of the analyzers that will run.
        others: Names of further findings, of which the fields are not known before, with the words that some of them
            may be.

    Raises:
        UsageError: An expression cannot be read, its finding or field will not be there, or never be what it says.
    """
    found = {name: _fields_of(name) for name in ("verdict", "model", *analyzers)}
    others = others or {}
    for expression in expressions:
        path, sign, wanted = parse_gate(expression)
        head, _, field = path.partition(".")
        head = head.replace("_", "-")
        if head in others:
            _refuse_never(path, sign, wanted, others[head].get(field))
            continue
        if head not in found:
            known = [*found, *others]
            hint = did_you_mean(head, known) or f"There are: {', '.join(known)}."
            raise UsageError(f"--fail-if: this run will have no {head!r}.", detail=hint)
        known = found[head]
        if known is not None and field not in known:
            raise _no_field(head, field, known)
        _refuse_never(path, sign, wanted, _words_of(head).get(field))


def _words_of(head: str) -> Mapping[str, Collection[str]]:
    """Fields of a part of the document that are one of a few words, with all of them."""
    if head == "verdict":
        return {"status": get_args(State)}
    return (
        {}
        if head == "model"
        else {"status": [str(status) for status in Status], **dict(registry[head].answers)}
    )


def _refuse_never(path: str, sign: str, wanted: str, words: Collection[str] | None) -> None:
    """Refuse to wait for a word that a field never is.

    Args:
        words: What the field may be; None where that is not known.
    """
    if words is None:
        return
    one_of = f"It is {' or '.join(words)}."
    if sign not in ("==", "!="):
        raise UsageError(
            f"--fail-if: {path} is a word, neither larger nor smaller than {wanted}.",
            detail=one_of,
            hint="Compare it with == or !=.",
        )
    word = wanted.strip("\"'")
    if (word.lower() if words == TRUTH else word) not in words:
        raise UsageError(
            f"--fail-if: {path} is never {word!r}.", detail=did_you_mean(word, words), hint=one_of
        )


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
