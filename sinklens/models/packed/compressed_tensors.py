"""compressed-tensors: integers packed in words or stored as bytes, and float8, with scales of many extents.

How it is computed: `(code - zero) * scale` in float32; a scale belongs to a tensor, a row, a group of inputs or a
block of rows and inputs. Packed integers (`pack-quantized`) are stored with 2^(bits-1) added, as one stream of bits
per row; their zero points as one per column. `int-quantized`, `float-quantized` and `naive-quantized` store a byte
per value.

When not to trust it: schemes that also quantise activations, keys or values lose more than what is seen here, where
only the weights are quantised.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from .bits import unpack, words_for
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

METHOD = "compressed-tensors"
PACK = "pack-quantized"
BYTES = ("int-quantized", "float-quantized", "naive-quantized")
STRATEGIES = ("tensor", "channel", "group", "block")
KNOWN = (
    "config_groups", "format", "global_compression_ratio", "ignore", "kv_cache_scheme", "quantization_status",
    "run_compressed", "sparsity_config", "transform_config", "version",
)  # fmt: skip
OF_WEIGHTS = (
    "actorder", "block_structure", "dynamic", "group_size", "num_bits", "observer", "observer_kwargs", "scale_dtype",
    "strategy", "symmetric", "type", "zp_dtype",
)  # fmt: skip
OF_ACTIVATIONS = (
    "input_scale", "input_zero_point", "input_g_idx", "output_scale", "output_zero_point", "q_scale", "k_scale",
    "v_scale",
)  # fmt: skip
"""Stored for activations, which are not quantised here."""


@dataclass(frozen=True)
class Scheme:
    """How the weights of some modules are stored.

    Attributes:
        targets: Names of modules, `re:` and a pattern of names, or a class.
        layout: The format.
        kind: `int` or `float`.
        group: Inputs that have one scale.
        block: Rows and inputs that have one scale.
    """

    targets: tuple[str, ...]
    layout: str
    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group: int = 0
    block: tuple[int, int] = (0, 0)


def settings_of(settings: Mapping[str, Any], name: str) -> tuple[Scheme, ...]:
    """What the config says of weights.

    Raises:
        ModelError: It says something that is not known.
    """
    refuse_unknown(name, METHOD, settings, KNOWN)
    status = settings.get("quantization_status", "compressed")
    if status != "compressed":
        raise refuse_setting(name, METHOD, "quantization_status", status, "compressed")
    sparse = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense":
        raise refuse_setting(name, METHOD, "sparsity_config.format", sparse, "dense")
    if (settings.get("transform_config") or {}).get("config_groups"):
        raise refuse_setting(name, METHOD, "transform_config", "config_groups", "none")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise refuse_setting(name, METHOD, "config_groups", groups, "groups with targets and weights")
    found = [
        _scheme(name, f"config_groups.{key}", group, settings.get("format")) for key, group in groups.items()
    ]
    return tuple(scheme for scheme in found if scheme is not None)


def _scheme(name: str, path: str, group: Mapping[str, Any], layout: Any) -> Scheme | None:
    """What a group says of weights; None if it leaves them as they are."""
    given = group.get("weights")
    layout = group.get("format") or layout
    if given is None or layout == "dense":
        return None
    refuse_unknown(name, METHOD, given, OF_WEIGHTS)
    if layout not in (PACK, *BYTES):
        raise refuse_setting(name, METHOD, f"{path}.format", layout, ", ".join((PACK, *BYTES)))
    bits, kind = whole(name, METHOD, given, "num_bits", 8), given.get("type", "int")
    if (
        kind not in ("int", "float")
        or not 1 <= bits <= 8
        or (kind == "float" and (bits != 8 or layout == PACK))
    ):
        raise refuse_setting(
            name, METHOD, f"{path}.weights", f"{kind}{bits}", "int1 to int8, float8 in bytes"
        )
    if given.get("dynamic"):
        raise refuse_setting(name, METHOD, f"{path}.weights.dynamic", given["dynamic"], "false")
    size = given.get("group_size")
    inferred = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = given.get("strategy") or inferred
    if strategy not in STRATEGIES or (strategy == "block" and layout == PACK):
        raise refuse_setting(name, METHOD, f"{path}.weights.strategy", strategy, ", ".join(STRATEGIES))
    if strategy == "group" and not (isinstance(size, int) and size > 0):
        raise refuse_setting(name, METHOD, f"{path}.weights.group_size", size, "a size")
    block = given.get("block_structure") or (0, 0)
    if strategy == "block" and not (len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        raise refuse_setting(name, METHOD, f"{path}.weights.block_structure", block, "rows and inputs")
    return Scheme(
        tuple(group.get("targets") or ()), layout, bits, kind, bool(given.get("symmetric", True)), strategy,
        size or 0, (block[0], block[1]),
    )  # fmt: skip


def dequantise(
    codes: Tensor,
    scales: Float32[Tensor, "..."],
    zeros: Float32[Tensor, "..."] | None,
    *,
    group: int = 0,
    block: tuple[int, int] = (0, 0),
    group_of: Int[Tensor, " in"] | None = None,
) -> Float32[Tensor, "rows in"]:
    """A weight from its codes, and the scales and zero points of what they belong to.

    Args:
        codes: `(rows, in)`, integers or float8.
        scales, zeros: Of shape `(1, 1)`, `(rows, 1)`, `(rows, groups)`, or a grid of blocks. No zeros: all are 0.
        group: Inputs that have one scale; 0 if scales are not of groups.
        block: Rows and inputs that have one scale.
        group_of: The group of each input, if it is not the one of its place.
    """
    values = codes.float()
    rows, inputs = values.shape
    if block[0]:
        for i in range(scales.shape[0]):
            part = values[i * block[0] : (i + 1) * block[0]]
            if zeros is not None:
                part -= zeros[i].repeat_interleave(block[1])[:inputs]
            part *= scales[i].repeat_interleave(block[1])[:inputs]
        return values
    if group and group_of is not None:
        for part, of_scales, index in zip(
            values.split(64), scales.split(64), torch.arange(rows).split(64), strict=True
        ):
            if zeros is not None:
                part -= zeros[index][:, group_of]
            part *= of_scales[:, group_of]
        return values
    if group:
        grouped = values.view(rows, -1, group)
        scales, zeros = scales[..., None], None if zeros is None else zeros[..., None]
    else:
        grouped = values
    if zeros is not None:
        grouped -= zeros
    grouped *= scales
    return values


def weights(stored: Stored, settings: tuple[Scheme, ...]) -> Iterator[PackedWeight]:
    """The packed weights: modules with a `weight_packed`, or with a `weight` and its `weight_scale`.

    Raises:
        ModelError: Tensors are missing, or do not fit together; or it cannot be told how a module is stored.
    """
    optional = ("weight_zero_point", "weight_g_idx", *OF_ACTIVATIONS)
    for module, found in modules(stored, "weight_packed"):
        scheme = _scheme_of(stored, found["weight_packed"], module, settings)
        zero = ("weight_zero_point",) if not scheme.symmetric else ()
        parts = parts_of(stored, found, "weight_packed", ("weight_scale", "weight_shape", *zero), optional)
        yield _packed(stored, module, parts, scheme)
    for module, found in modules(stored, "weight_scale"):
        if "weight_packed" in found:
            continue
        scheme = _scheme_of(stored, found["weight_scale"], module, settings)
        zero = ("weight_zero_point",) if not scheme.symmetric else ()
        parts = parts_of(stored, found, "weight_scale", ("weight", *zero), optional)
        yield _in_bytes(stored, module, parts, scheme)


def _scheme_of(stored: Stored, key: str, module: str, schemes: tuple[Scheme, ...]) -> Scheme:
    """The one scheme for a module: by its name, else by its class, of which a checkpoint knows nothing."""

    def named(target: str) -> bool:
        pattern = target.removeprefix("re:")
        return target == module or (target != pattern and re.match(pattern, module) is not None)

    found = [scheme for scheme in schemes if any(map(named, scheme.targets))]
    if not found:
        found = [
            scheme
            for scheme in schemes
            if any(not t.startswith("re:") and "." not in t for t in scheme.targets)
        ]
    if len({(s.layout, s.bits, s.kind, s.symmetric, s.strategy, s.group, s.block) for s in found}) != 1:
        raise refuse_content(
            stored, key, "cannot be read with certainty",
            f"{len(found)} groups of quantization_config.config_groups are for {module}.",
        )  # fmt: skip
    return found[0]


def _packed(stored: Stored, module: str, parts: dict[str, str], scheme: Scheme) -> PackedWeight:
    key, shape_key = parts["weight_packed"], parts["weight_shape"]
    if scheme.layout != PACK:
        raise refuse_content(
            stored, key, f"is packed, but its format is {scheme.layout}", f"Expected: {PACK}."
        )
    expect(stored, shape_key, (2,), (torch.int64, torch.int32))
    rows, inputs = stored.read(shape_key).tolist()
    expect(stored, key, (rows, words_for(inputs, scheme.bits)), (torch.int32,))
    extent = _extent(stored, parts["weight_scale"], rows, inputs, scheme)
    if not scheme.symmetric and scheme.strategy != "tensor":
        across = (words_for(rows, scheme.bits), extent[1])
        expect(stored, parts["weight_zero_point"], across, (torch.int32,))
    read = partial(_from_packed, stored, parts, scheme, (rows, inputs), extent)
    return PackedWeight(f"{module}.weight", (rows, inputs), parts, read)


def _in_bytes(stored: Stored, module: str, parts: dict[str, str], scheme: Scheme) -> PackedWeight:
    if scheme.layout == PACK:
        key = parts["weight"]
        raise refuse_content(
            stored, key, f"is not packed, but its format is {PACK}", f"Expected: {module}.weight_packed."
        )
    rows, inputs = matrix(stored, parts["weight"])
    expect_dtype(stored, parts["weight"], (torch.int8 if scheme.kind == "int" else torch.float8_e4m3fn,))
    extent = _extent(stored, parts["weight_scale"], rows, inputs, scheme)
    read = partial(_from_bytes, stored, parts, scheme, extent)
    return PackedWeight(f"{module}.weight", (rows, inputs), parts, read)


def _extent(stored: Stored, key: str, rows: int, inputs: int, scheme: Scheme) -> tuple[int, int]:
    """The scales of a weight, down and across; they are of that shape or, where one axis is 1, of fewer axes."""
    if scheme.strategy == "group" and inputs % scheme.group:
        raise refuse_content(
            stored, key, f"is for {inputs} inputs", f"The config asks for groups of {scheme.group}."
        )
    down, across = {
        "tensor": (1, 1),
        "channel": (rows, 1),
        "group": (rows, inputs // max(1, scheme.group)),
        "block": (-(-rows // max(1, scheme.block[0])), -(-inputs // max(1, scheme.block[1]))),
    }[scheme.strategy]
    flat = {"tensor": ((), (1,)), "channel": ((rows,),)}.get(scheme.strategy, ())
    if stored.shape_of(key) not in flat:
        expect(stored, key, (down, across), SCALES)
    expect_dtype(stored, key, SCALES)
    return down, across


def _spread(given: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Any]:
    group_of = given.get("weight_g_idx")
    if group_of is not None and bool((group_of == -1).all()):
        group_of = None  # was never set
    return {
        "group": scheme.group if scheme.strategy == "group" else 0,
        "block": scheme.block,
        "group_of": group_of,
    }


def _checked(stored: Stored, parts: dict[str, str], spread: dict[str, Any], inputs: int, across: int) -> None:
    """Refuse groups of inputs that are not there."""
    group_of = spread["group_of"]
    if group_of is None:
        return
    expect(stored, parts["weight_g_idx"], (inputs,), (torch.int32, torch.int64))
    if not spread["group"] or int(group_of.min()) < 0 or int(group_of.max()) >= across:
        raise refuse_content(
            stored, parts["weight_g_idx"], f"names groups {int(group_of.min())} to {int(group_of.max())}",
            f"There are {across if spread['group'] else 'none'}.",
        )  # fmt: skip
    spread["group_of"] = group_of.long()


def _symmetric(stored: Stored, parts: dict[str, str], given: Mapping[str, Tensor]) -> None:
    zero = given.get("weight_zero_point")
    if zero is not None and bool((zero.float() != 0).any()):
        raise refuse_content(
            stored,
            parts["weight_zero_point"],
            "is not zero",
            "The config says that the weights are symmetric.",
        )


def _from_packed(
    stored: Stored,
    parts: dict[str, str],
    scheme: Scheme,
    shape: tuple[int, int],
    extent: tuple[int, int],
    given: Mapping[str, Tensor],
) -> Tensor:
    codes = unpack(given["weight_packed"], scheme.bits, shape[1], 1)
    middle = 2 ** (scheme.bits - 1)
    if scheme.symmetric:
        _symmetric(stored, parts, given)
        zeros = torch.tensor(float(middle)).expand(extent)
    elif scheme.strategy == "tensor":
        zeros = given["weight_zero_point"].float().reshape(1, 1) + middle
    else:
        zeros = unpack(given["weight_zero_point"], scheme.bits, shape[0], 0).float()
    spread = _spread(given, scheme)
    _checked(stored, parts, spread, shape[1], extent[1])
    return dequantise(codes, given["weight_scale"].float().reshape(extent), zeros, **spread)


def _from_bytes(
    stored: Stored,
    parts: dict[str, str],
    scheme: Scheme,
    extent: tuple[int, int],
    given: Mapping[str, Tensor],
) -> Tensor:
    zeros = None
    if scheme.symmetric:
        _symmetric(stored, parts, given)
    else:
        zeros = given["weight_zero_point"]
        if zeros.numel() != math.prod(extent):
            expect(stored, parts["weight_zero_point"], extent, (zeros.dtype,))
        zeros = zeros.float().reshape(extent)
    spread = _spread(given, scheme)
    _checked(stored, parts, spread, given["weight"].shape[1], extent[1])
    return dequantise(given["weight"], given["weight_scale"].float().reshape(extent), zeros, **spread)


FORMAT = Format(settings_of, weights, scratch=7)
