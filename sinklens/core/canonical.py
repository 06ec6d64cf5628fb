"""Results as JSON that every parser accepts: no NaN, no numpy, no paths."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Set
from enum import Enum
from pathlib import PurePath
from typing import Any

Plain = None | bool | int | float | str | list[Any] | dict[str, Any]


def plain(value: Any) -> Plain:
    """`value` as plain data.

    NaN and infinities become None (JSON has no word for them), numpy and torch scalars Python numbers, their
    arrays lists, dataclasses and mappings dicts with string keys, sets sorted lists, paths their last part (a
    document that is shared must not tell how its author's disk is laid out).

    Raises:
        TypeError: For anything else; a result that cannot be written down is a bug, not a string.
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_key(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Set):
        return sorted((plain(item) for item in value), key=repr)
    if isinstance(value, PurePath):
        return value.name
    if not isinstance(value, type) and hasattr(value, "tolist"):  # numpy and torch, arrays and scalars alike
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")


def _key(key: Any) -> str:
    found = plain(key)
    if isinstance(found, (list, dict)):
        raise TypeError(f"{key!r} cannot be a key in JSON")
    return found if isinstance(found, str) else json.dumps(found)


def dumps(value: Any, *, indent: int | None = None) -> str:
    """`plain(value)` as JSON text; keys keep their order, so equal results give equal text."""
    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)
