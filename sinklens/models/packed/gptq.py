"""GPTQ: integers of 2, 3, 4 or 8 bits in columns of words, a scale and a zero point for each group of inputs.

How it is computed: `(code - zero) * scale` of the output and of the input's group (`g_idx`), in float32, where the
product of a half-precision scale and so small an integer is exact. Checkpoints of the format `gptq` store each zero
point less one, those of `gptq_v2` as it is. A zero point of 0 cannot be stored less one: AutoGPTQ's own kernels read
what is stored then as 0 (`qlinear_cuda_old`) and as 2^bits (`qlinear_cuda`), so it is refused.

When not to trust it: kernels compute with these values in float16, whatever the config's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

from .bits import unpack, words_for
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

METHOD = "gptq"
BITS = (2, 3, 4, 8)
LESS_ONE = {"gptq": True, "gptq_v2": False}
"""Layouts, and whether each zero point is stored less one."""
KNOWN = (
    "bits", "checkpoint_format", "disable_exllama", "dynamic", "format", "group_size", "hyb_act", "is_marlin_format",
    "model_file_base_name", "model_name_or_path", "mse", "pack_dtype", "quantizer", "static_groups", "use_cuda_fp16",
    "use_exllama", *UNTOUCHED,
)  # fmt: skip
"""Settings that are looked at here, and those of AutoGPTQ's search and kernels, which the weights do not depend on."""


@dataclass(frozen=True)
class Settings:
    """What the config says.

    Attributes:
        group: Inputs that have one scale; -1 for all.
        less_one: Whether zero points are stored less one.
    """

    bits: int
    group: int
    less_one: bool


def settings_of(settings: Mapping[str, Any], name: str) -> Settings:
    """What the config says.

    Raises:
        ModelError: It says something that is not known.
    """
    refuse_unknown(name, METHOD, settings, KNOWN)
    bits, group = whole(name, METHOD, settings, "bits"), group_size(name, METHOD, settings)
    if bits not in BITS:
        raise refuse_setting(name, METHOD, "bits", bits, ", ".join(map(str, BITS)))
    layout = settings.get("checkpoint_format") or settings.get("format") or METHOD
    if layout not in LESS_ONE:
        raise refuse_setting(name, METHOD, "checkpoint_format", layout, ", ".join(LESS_ONE))
    if settings.get("is_marlin_format"):
        raise refuse_setting(name, METHOD, "is_marlin_format", True, "false")
    for key in settings.get("dynamic") or {}:
        if not key.startswith("-:"):  # those are left unquantised, which the stored tensors say
            raise refuse_setting(name, METHOD, "dynamic", key, "-:, for modules that are not quantised")
    return Settings(bits, group, LESS_ONE[layout])


def dequantise(
    codes: UInt8[Tensor, "in out"],
    zeros: UInt8[Tensor, "groups out"],
    scales: Float[Tensor, "groups out"],
    group_of: Int[Tensor, " in"],
) -> Float32[Tensor, "in out"]:
    """A weight, inputs first, from its codes and the zero points and scales of each input's group."""
    values = codes.float()
    scales, zeros = scales.float(), zeros.float()
    for rows in torch.arange(len(values)).split(256):  # for all at once, scales would be two more copies
        groups = group_of[rows].long()
        values[rows[0] : rows[-1] + 1].sub_(zeros[groups]).mul_(scales[groups])
    return values


def weights(stored: Stored, settings: Settings) -> Iterator[PackedWeight]:
    """The packed weights: modules with a `qweight`.

    Raises:
        ModelError: Tensors are missing, or do not fit together.
    """
    for module, found in modules(stored, CODES):
        parts = parts_of(stored, found, "qweight", ("qzeros", "scales"), ("g_idx",))
        height, outputs = matrix(stored, parts["qweight"])
        groups, _ = matrix(stored, parts["scales"])
        expect_dtype(stored, parts["qweight"], (torch.int32,))
        inputs = stored.shape_of(parts["g_idx"])[0] if "g_idx" in parts else height * 32 // settings.bits
        if words_for(inputs, settings.bits) != height or height % settings.bits * (settings.bits == 3):
            raise refuse_content(
                stored, parts["qweight"], f"has {height} rows",
                f"{inputs} inputs of {settings.bits} bits take {words_for(inputs, settings.bits)}.",
            )  # fmt: skip
        if "g_idx" in parts:
            expect(stored, parts["g_idx"], (inputs,), (torch.int32, torch.int64))
        size = inputs if settings.group == -1 else settings.group
        expect(stored, parts["scales"], (-(-inputs // size), outputs), SCALES)
        expect(stored, parts["qzeros"], (groups, words_for(outputs, settings.bits)), (torch.int32,))
        yield PackedWeight(
            f"{module}.weight", (outputs, inputs), parts, partial(_unpacked, stored, parts, settings, inputs)
        )
    refuse_without_codes(stored, ("qzeros", "g_idx"))


def _unpacked(
    stored: Stored, parts: dict[str, str], settings: Settings, inputs: int, given: Mapping[str, Tensor]
) -> Tensor:
    bits, scales = settings.bits, given["scales"]
    zeros = unpack(given["qzeros"], bits, scales.shape[1], 1)
    if settings.less_one:
        if bool((zeros == 2**bits - 1).any()):
            raise refuse_content(
                stored, parts["qzeros"], f"holds {2**bits - 1}, which readers take for {2**bits} or for 0",
                "The format stores zero points less one, and nothing is less than 0. The format gptq_v2 stores 0 as 0.",
            )  # fmt: skip
        zeros += 1
    size = inputs if settings.group == -1 else settings.group
    group_of = given.get("g_idx", torch.arange(inputs) // size)
    if int(group_of.min()) < 0 or int(group_of.max()) >= len(scales):
        raise refuse_content(
            stored, parts["g_idx"], f"names groups {int(group_of.min())} to {int(group_of.max())}",
            f"There are {len(scales)}, from 0 on.",
        )  # fmt: skip
    return dequantise(unpack(given["qweight"], bits, inputs, 0), zeros, scales, group_of).T


FORMAT = Format(settings_of, weights, scratch=9)
