"""AWQ: four-bit integers in rows of words whose outputs are interleaved, a scale and a zero point per group of inputs.

How it is computed: `(code - zero) * scale` of the output and of the input's group, in float32. A word holds the outputs
0, 2, 4, 6, 1, 3, 5, 7 of eight, from its lowest bits on; zero points lie in the same order. The layout is that of the
version `gemm`; others pack otherwise and are refused.

When not to trust it: kernels compute with these values in float16, whatever the config's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float32, Int32, UInt8
from torch import Tensor

from .bits import unpack
from .qweight import CODES, UNTOUCHED, group_size, refuse_without_codes
from .weights import (
    SCALES,
    Format,
    PackedWeight,
    Stored,
    expect,
    expect_dtype,
    matrix,
    modules,
    parts_of,
    refuse_content,
    refuse_setting,
    refuse_unknown,
    whole,
)

METHOD = "awq"
BITS = 4
IN_A_WORD = 8
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each output of eight lies in its word."""
KNOWN = (
    "bits", "checkpoint_format", "do_fuse", "format", "fuse_max_seq_len", "group_size", "modules_to_fuse",
    "modules_to_not_convert", "pack_dtype", "q_group_size", "version", "w_bit", "zero_point", *UNTOUCHED,
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What the config says: inputs that have one scale, -1 for all."""

    group: int


def settings_of(settings: Mapping[str, Any], name: str) -> Settings:
    """What the config says.

    Raises:
        ModelError: It says something that is not known.
    """
    refuse_unknown(name, METHOD, settings, KNOWN)
    bits = whole(name, METHOD, settings, "bits" if "bits" in settings else "w_bit")
    if bits != BITS:
        raise refuse_setting(name, METHOD, "bits", bits, str(BITS))
    group = group_size(name, METHOD, settings, "group_size" if "group_size" in settings else "q_group_size")
    for key in ("version", "format", "checkpoint_format"):
        if str(settings.get(key) or "gemm").lower() != "gemm":
            raise refuse_setting(name, METHOD, key, settings[key], "gemm")
    if not settings.get("zero_point", True):
        raise refuse_setting(name, METHOD, "zero_point", settings["zero_point"], "true")
    if settings.get("backend") == "llm-awq":
        raise refuse_setting(name, METHOD, "backend", "llm-awq", "those that store the version gemm")
    return Settings(group)


def in_order(words: Int32[Tensor, "rows words"]) -> UInt8[Tensor, "rows out"]:
    """The four-bit integers of words by output."""
    codes = unpack(words, BITS, IN_A_WORD * words.shape[1], 1).view(len(words), -1, IN_A_WORD)
    found = torch.empty_like(codes)
    for output, place in enumerate(PLACES):
        found[..., output] = codes[..., place]
    return found.view(len(words), -1)


def dequantise(
    codes: UInt8[Tensor, "in out"],
    zeros: UInt8[Tensor, "groups out"],
    scales: Float[Tensor, "groups out"],
    size: int,
) -> Float32[Tensor, "in out"]:
    """A weight, inputs first, from its codes and the zero points and scales of groups of `size` inputs."""
    values = codes.float()
    grouped = values.view(-1, size, values.shape[1])
    grouped.sub_(zeros.float()[:, None]).mul_(scales.float()[:, None])
    return values


def weights(stored: Stored, settings: Settings) -> Iterator[PackedWeight]:
    """The packed weights: modules with a `qweight`.

    Raises:
        ModelError: Tensors are missing, or do not fit together; or inputs of a map are scaled by a tensor that the
            model has no place for.
    """
    for module, found in modules(stored, CODES):
        parts = parts_of(stored, found, "qweight", ("qzeros", "scales"))
        inputs, width = matrix(stored, parts["qweight"])
        size = inputs if settings.group == -1 else settings.group
        if inputs % size:
            raise refuse_content(
                stored, parts["qweight"], f"has {inputs} inputs", f"The config asks for groups of {size}."
            )
        expect_dtype(stored, parts["qweight"], (torch.int32,))
        expect(stored, parts["qzeros"], (inputs // size, width), (torch.int32,))
        expect(stored, parts["scales"], (inputs // size, IN_A_WORD * width), SCALES)
        shape = IN_A_WORD * width, inputs
        yield PackedWeight(f"{module}.weight", shape, parts, partial(_unpacked, size))
    refuse_without_codes(stored, ("qzeros",))
    for key in stored.where:
        if key.endswith(".scales") and f"{key.removesuffix('scales')}{CODES}" not in stored.where:
            raise refuse_content(
                stored,
                key,
                "scales what no packed weight belongs to",
                "The model's own classes would leave it out.",
            )


def _unpacked(size: int, given: Mapping[str, Tensor]) -> Tensor:
    codes, zeros = in_order(given["qweight"]), in_order(given["qzeros"])
    return dequantise(codes, zeros, given["scales"], size).T


FORMAT = Format(settings_of, weights, scratch=7)
