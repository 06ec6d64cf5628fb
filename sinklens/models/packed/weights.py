"""What the formats of packed weights have in common: which stored tensors are one weight, and how it is refused."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sinklens.core.errors import ModelError

TOGETHER = "Check that config.json and the weights belong together."
ELSEWHERE = "Use --stream off with the library of the format, or open the unquantised checkpoint."
SCALES = (torch.float16, torch.bfloat16, torch.float32)


class Stored(Protocol):
    """Stored tensors by name."""

    @property
    def name(self) -> str: ...
    @property
    def where(self) -> Mapping[str, Any]: ...
    def file_of(self, key: str) -> str: ...
    def dtype_of(self, key: str) -> torch.dtype: ...
    def shape_of(self, key: str) -> tuple[int, ...]: ...
    def read(self, key: str) -> Tensor: ...


@dataclass(frozen=True)
class PackedWeight:
    """A weight that is stored as several tensors.

    Attributes:
        name: What it is called in an unquantised checkpoint.
        shape: Of the weight.
        parts: What each of its tensors is, to the name it is stored under.
        dequantise: From those tensors to the weight in float32.
    """

    name: str
    shape: tuple[int, ...]
    parts: dict[str, str]
    dequantise: Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Format:
    """A format of packed weights.

    Attributes:
        settings: What the config says, from its `quantization_config` and the name of the model. Raises ModelError
            for what is not known.
        weights: The packed weights among stored tensors. Raises ModelError where they do not fit together.
        scratch: Bytes in memory per value while a weight is dequantised, beside the values that come out.
    """

    settings: Callable[[Mapping[str, Any], str], Any]
    weights: Callable[[Stored, Any], Iterator[PackedWeight]]
    scratch: int


def refuse_setting(name: str, method: str, key: str, value: Any, expected: str) -> ModelError:
    """The refusal of a checkpoint whose config says something that is not known here."""
    return ModelError(
        f"{name!r} is quantised ({method}) with {key} = {value!r}, which is not dequantised here.",
        detail=f"Known: {expected}.",
        hint=ELSEWHERE,
    )


def refuse_unknown(name: str, method: str, settings: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse settings that might change what the stored numbers stand for.

    Args:
        known: Settings that are understood, or that do not touch the stored weights.

    Raises:
        ModelError: The first unknown setting is named.
    """
    known = {"quant_method", *known}
    for key, value in settings.items():
        if key not in known and value is not None:
            raise refuse_setting(name, method, key, value, "no such setting")


def whole(name: str, method: str, settings: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A setting that is a whole number.

    Raises:
        ModelError: It is something else.
    """
    value = settings.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise refuse_setting(name, method, key, value, "whole numbers")
    return value


def modules(stored: Stored, lead: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Modules that have a tensor called `lead`, and all stored tensors of each by what follows the module's name."""
    keys = sorted(stored.where)
    for key in keys:
        if not key.endswith(f".{lead}"):
            continue
        start = key.removesuffix(lead)
        found: dict[str, str] = {}
        for at in range(bisect_left(keys, start), len(keys)):
            if not keys[at].startswith(start):
                break
            found[keys[at].removeprefix(start)] = keys[at]
        yield start.removesuffix("."), found


def parts_of(
    stored: Stored, found: Mapping[str, str], lead: str, needed: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, str]:
    """The tensors of one weight.

    Args:
        found: All stored tensors of the module.
        lead: The one that the others belong to.
        needed, optional: Those that must and may be there. A bias is no part of the weight and stays.

    Raises:
        ModelError: One is missing, or there is one more that nothing is known about.
    """
    for part in needed:
        if part not in found:
            key = found[lead]
            raise ModelError(
                f"{key} in {stored.file_of(key)} of {stored.name!r} has no {part} beside it.",
                detail=f"Stored with it: {', '.join(sorted(found.keys() - {lead})) or 'nothing'}.",
                hint="Copy or download the checkpoint again.",
            )
    for part in found.keys() - {lead, "bias", *needed, *optional}:
        key = found[part]
        raise ModelError(
            f"{key} in {stored.file_of(key)} of {stored.name!r} is not known in this format.",
            detail="It may change what the weight beside it stands for.",
            hint=ELSEWHERE,
        )
    return {part: found[part] for part in (lead, *needed, *optional) if part in found}


def expect(stored: Stored, key: str, shape: tuple[int, ...], dtypes: Sequence[torch.dtype]) -> None:
    """Refuse a tensor of another shape or type.

    Raises:
        ModelError: What is stored, and what was expected.
    """
    if stored.shape_of(key) != shape:
        raise ModelError(
            f"{key} in {stored.file_of(key)} of {stored.name!r} has the shape {list(stored.shape_of(key))}.",
            detail=f"The tensors beside it and the config ask for {list(shape)}.",
            hint=TOGETHER,
        )
    expect_dtype(stored, key, dtypes)


def matrix(stored: Stored, key: str) -> tuple[int, int]:
    """The shape of a tensor with rows and columns.

    Raises:
        ModelError: It has another number of axes.
    """
    shape = stored.shape_of(key)
    if len(shape) != 2 or not all(shape):
        raise ModelError(
            f"{key} in {stored.file_of(key)} of {stored.name!r} has the shape {list(shape)}.",
            detail="Expected rows and columns.",
            hint=TOGETHER,
        )
    return shape[0], shape[1]


def expect_dtype(stored: Stored, key: str, dtypes: Sequence[torch.dtype]) -> None:
    """Refuse a tensor of another type.

    Raises:
        ModelError: What is stored, and what was expected.
    """
    if stored.dtype_of(key) not in dtypes:
        names = [str(kind).removeprefix("torch.") for kind in (stored.dtype_of(key), *dtypes)]
        raise ModelError(
            f"{key} in {stored.file_of(key)} of {stored.name!r} is stored as {names[0]}.",
            detail=f"Expected: {' or '.join(names[1:])}.",
            hint=TOGETHER,
        )


def refuse_content(stored: Stored, key: str, what: str, detail: str) -> ModelError:
    """The refusal of a tensor whose numbers cannot be used."""
    return ModelError(
        f"{key} in {stored.file_of(key)} of {stored.name!r} {what}.", detail=detail, hint=ELSEWHERE
    )
