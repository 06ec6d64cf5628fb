"""Methods from their command-line form: `zero-tuning:gamma=2:layers=1-3,act,knock-out:heads=L2H0+L3H1`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import MISSING, fields
from typing import Any

from sinklens.core.errors import UsageError
from sinklens.core.suggest import did_you_mean
from sinklens.tracers.sink_dims import SinkDims

from .method import FOUND, Method, registry
from .tables import SUFFIXES, load_table, shape_of

_HEAD = re.compile(r"L?(\d+)[H.](\d+)(?:=([0-9.eE+-]+))?")
_EXPERT = re.compile(r"L?(\d+)[E/.](\d+)")
_SPAN = re.compile(r"(\d+)-(\d+)")
_WORDS = {"true": True, "yes": True, "false": False, "no": False, "none": None}


def chosen_methods(asked: str | Iterable[Method | str | type[Method]]) -> tuple[Method, ...]:
    """Methods from instances, classes or their command-line forms, in the order given.

    Raises:
        UsageError: No such method or parameter, or the same method with the same parameters twice.
    """
    items = asked.split(",") if isinstance(asked, str) else list(asked)
    found: list[Method] = []
    for item in items:
        if isinstance(item, str) and not item.strip():
            continue
        method = make_method(item.strip()) if isinstance(item, str) else item
        found.append(method() if isinstance(method, type) else method)
    if not found:
        raise UsageError(
            "No mitigation was named.",
            hint="For instance: --with zero-tuning:gamma=2,act. See: sinklens ls mitigations",
        )
    for method in found:
        if found.count(method) > 1:
            raise UsageError(f"{method.name} is asked for twice with the same parameters.")
    return tuple(found)


def make_method(text: str) -> Method:
    """One method from `name:parameter=value:parameter=value`."""
    name, *settings = text.split(":")
    if "=" in name and name not in registry:
        raise UsageError(
            f"{name!r} is no mitigation.",
            detail="Commas separate mitigations; a colon goes before each parameter.",
            hint="For instance: zero-tuning:gamma=2:layers=1-3",
        )
    cls = registry[name]
    given = dict(_setting(cls, setting) for setting in settings)
    missing = [
        f.name
        for f in fields(cls)
        if f.default is MISSING and f.default_factory is MISSING and f.name not in given
    ]
    if missing:
        raise UsageError(
            f"{name} needs a value for {' and '.join(missing)}.", hint=f"Write {name}:{missing[0]}=VALUE."
        )
    return built(cls, given)


def built(cls: type[Method], given: dict[str, Any]) -> Method:
    """An instance; whatever a method says of its parameters is said in words."""
    try:
        return cls(**given)
    except TypeError as error:
        raise UsageError(f"{cls.name}: a parameter has the wrong form: {error}.") from error


def _setting(cls: type[Method], text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    key = key.replace("-", "_")
    known = {f.name: f.default for f in fields(cls)}
    if key not in known:
        raise UsageError(
            f"{cls.name} has no parameter {key!r}.",
            detail=did_you_mean(key, known) or f"It has: {', '.join(known)}.",
            hint=f"Write {cls.name}:parameter=value.",
        )
    if not equals or not value:
        raise UsageError(f"{cls.name}: {key} needs a value.", hint=f"Write {cls.name}:{key}=VALUE.")
    return key, _value(cls, key, value, known[key])


def _kind(cls: type[Method], key: str) -> str:
    """A parameter's annotation."""
    return next(str(f.type) for f in fields(cls) if f.name == key)


def _value(cls: type[Method], key: str, text: str, default: Any) -> Any:
    kind = _kind(cls, key)
    if isinstance(default, str) and not ("Collection" in kind and text[0].isdigit()):
        return text
    if isinstance(default, bool):
        if not isinstance(_WORDS.get(text.lower()), bool):
            raise UsageError(f"{cls.name}: {key} must be true or false, got {text!r}.")
        return _WORDS[text.lower()]
    if text.lower() == "none" and (default is None or "None" in kind):
        return None
    if key in getattr(cls, "tables", ()) and text.endswith(SUFFIXES):
        return load_table(text, key)
    if text == FOUND and FOUND in kind:
        return text
    many = isinstance(default, tuple) or "+" in text or "Pair" in kind
    many = many or key in ("heads", "layers", "shared_heads", "positions")
    parts = [one for part in text.split("+") for one in _parts(cls, key, part)]
    if key == "heads" and not all(isinstance(part, tuple) for part in parts):
        raise UsageError(
            f"{cls.name}: {text!r} names no heads.", hint="Write heads=L2H0+L3H1, counted from 0."
        )
    if many or (len(parts) > 1 and default is None):
        return tuple(parts)
    if len(parts) > 1:
        raise UsageError(f"{cls.name}: {key} must be one number, got {text!r}.")
    number = parts[0]
    if isinstance(default, float) and isinstance(number, int):
        return float(number)
    if isinstance(default, int) and not isinstance(number, int):
        raise UsageError(f"{cls.name}: {key} must be a whole number, got {text!r}.")
    return number


def _parts(cls: type[Method], key: str, text: str) -> list[Any]:
    if "Pair" in _kind(cls, key):
        expert = _EXPERT.fullmatch(text)
        if expert is None:
            raise UsageError(
                f"{cls.name}: {text!r} names no expert.",
                hint=f"Write {key}=2/7+3/0 (layer/expert, counted from 0).",
            )
        return [(int(expert[1]), int(expert[2]))]
    head = _HEAD.fullmatch(text) if key in ("heads", "gammas") else None
    if head and head[3]:
        return [(int(head[1]), int(head[2]), float(head[3]))]
    if head:
        return [(int(head[1]), int(head[2]))]
    span = _SPAN.fullmatch(text)
    if span:
        return list(range(int(span[1]), int(span[2]) + 1))
    for kind in (int, float):
        try:
            return [kind(text)]
        except ValueError:
            continue
    if key in ("heads", "gammas"):
        raise UsageError(
            f"{cls.name}: {text!r} names no head.", hint="Write heads=L2H0+L3H1, counted from 0."
        )
    raise UsageError(f"{cls.name}: {key} must be a number, got {text!r}.")


def label_of(method: Method, *, without: Collection[str] = ()) -> str:
    """The command-line form of a method, with the parameters that differ from their defaults; long ones are counted.

    Args:
        without: Parameters to leave out.
    """
    from .calibration import changed

    said = [f"{key}={_short(key, value)}" for key, value in changed(method).items() if key not in without]
    return ":".join([method.name, *said])


def _short(key: str, value: Any) -> str:
    if isinstance(value, SinkDims):
        value = value.indices
    if isinstance(value, tuple):
        if value and isinstance(value[0], tuple) and not all(isinstance(n, int) for n in value[0][:2]):
            return "x".join(map(str, shape_of(value))) + " numbers"
        if value and isinstance(value[0], tuple):
            kind = "E" if "experts" in key else "H"
            shown = [
                f"L{item[0]}{kind}{item[1]}" + (f"={item[2]:g}" if len(item) > 2 else "") for item in value
            ]
        else:
            shown = [str(item) for item in value]
        return "+".join(shown) if len(shown) <= 4 else f"{len(shown)} of them"
    return f"{value:g}" if isinstance(value, float) else str(value)
