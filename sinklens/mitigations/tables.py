"""Parameters with a value per head, or per layer and head: numbers, nested sequences, arrays, tensors, files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sinklens.core.errors import DataError, UsageError
from sinklens.models.spec import Tower

SUFFIXES = (".json", ".npy", ".npz", ".safetensors")


def nested(name: str, key: str, value: Any, depths: Sequence[int]) -> Any:
    """A number, or tuples of numbers in tuples, as deep as one of `depths` says.

    Raises:
        UsageError: It is not, or its rows differ in length, or a number is not finite.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    try:
        found, shape = _frozen(value)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{name}: {key} must hold finite numbers in rows of equal length.", detail=f"{error}."
        ) from error
    if len(shape) not in depths:
        expected = " or ".join({0: "one number", 1: "one per head"}.get(d, f"{d} axes") for d in depths)
        raise UsageError(f"{name}: {key} has {len(shape)} axes {shape}, expected {expected}.")
    return found


def _frozen(value: Any) -> tuple[Any, tuple[int, ...]]:
    if isinstance(value, str):
        raise TypeError(f"found {value!r}")
    if not isinstance(value, Sequence):
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"found {number}")
        return number, ()
    rows = [_frozen(row) for row in value]
    if not rows or len({shape for _, shape in rows}) > 1:
        raise ValueError("an axis is empty, or its rows differ")
    return tuple(row for row, _ in rows), (len(rows), *rows[0][1])


def shape_of(value: Any) -> tuple[int, ...]:
    """Axes of a nested tuple."""
    return (len(value), *shape_of(value[0])) if isinstance(value, tuple) else ()


def fits(name: str, key: str, value: Any, tower: Tower, heads: Sequence[int], *, first: bool = True) -> None:
    """Refuse a table that is not of a model's layers and heads.

    Args:
        heads: How many heads it may have.
        first: Whether an axis of layers comes first.
    """
    shape = shape_of(value)
    layers, at = len(tower.blocks), int(first)
    wrong = []
    if first and shape and shape[0] != layers:
        wrong.append(f"{shape[0]} layers, and the model has {layers}")
    if len(shape) > at and shape[at] not in heads:
        wrong.append(f"{shape[at]} heads, and the model has {' or '.join(map(str, dict.fromkeys(heads)))}")
    if wrong:
        raise UsageError(f"{name}: {key} is for {' and '.join(wrong)}.")


def load_table(path: str, key: str) -> Any:
    """A table from a file: JSON (a list, or an object with `key`), or an array, of that name where there are several.

    Raises:
        DataError: It cannot be read, or has nothing of that name.
    """
    place = Path(path)
    try:
        found = json.loads(place.read_text(encoding="utf-8")) if place.suffix == ".json" else _arrays(place)
    except (OSError, ValueError) as error:
        raise DataError(f"{place.name!r} cannot be read as values of {key}: {error}.") from error
    if not isinstance(found, dict):
        return found
    if key not in found:
        raise DataError(f"{place.name!r} has no {key!r}.", detail=f"It has: {', '.join(map(str, found))}.")
    return found[key]


def _arrays(place: Path) -> Any:
    import numpy as np

    if place.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return {name: tensor.float().tolist() for name, tensor in load_file(place).items()}
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    found = np.load(place, allow_pickle=False)
    return found.tolist() if isinstance(found, np.ndarray) else {k: found[k].tolist() for k in found.files}
