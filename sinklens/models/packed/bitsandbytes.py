"""bitsandbytes: four-bit codes in blocks (`nf4`, `fp4`), their scales perhaps quantised again; and LLM.int8.

How it is computed: a four-bit weight is a table's value at its code times the scale of its block, two codes in a byte,
the first one in its high bits, row after row. Scales that were quantised again ("double quantisation") are a stored
table's value at a code times a scale of their own, plus an offset. An eight-bit weight is its code times the scale of
its row over 127. All in float32, as the operations of bitsandbytes 0.50.2 in torch do.

When not to trust it: LLM.int8 takes inputs with large entries out of the eight-bit product and rounds the others. Here
nothing is rounded but the weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float32, Int8, UInt8
from torch import Tensor

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
    refuse_unknown,
)

METHOD = "bitsandbytes"
STATE = "weight.quant_state.bitsandbytes__"
TABLES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(
        sign * value / 12 for sign in (1, -1) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    ),
}  # fmt: skip
"""What each code stands for: quantiles of a normal distribution, and floats of two exponent bits and one of fraction
(with 1/16 of a twelfth where a subnormal would be)."""
INVERSE_127 = 7.874015718698502e-3
ROW = 0
"""The only order of eight-bit weights in memory that is stored nowadays; others belong to certain GPUs."""
STORAGE = (
    torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip
"""What four-bit codes may be stored as: the bytes are the same."""
KNOWN = (
    "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "llm_int8_threshold", "llm_int8_skip_modules",
    "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage",
)  # fmt: skip
"""Settings. Each stored weight says itself how it was quantised, so none of them is needed."""


def settings_of(settings: Mapping[str, Any], name: str) -> None:
    """Nothing: what is needed is stored with each weight.

    Raises:
        ModelError: There is a setting that is not known.
    """
    refuse_unknown(name, METHOD, settings, KNOWN)


def scales(
    codes: UInt8[Tensor, " blocks"],
    table: Float32[Tensor, " 256"],
    absmax: Float32[Tensor, " outer"],
    size: int,
    offset: float,
) -> Float32[Tensor, " blocks"]:
    """Scales that were quantised again, in blocks of `size`, after `offset` was taken from them."""
    spread = absmax.repeat_interleave(size)[: len(codes)]
    return table[codes.int()] * spread + torch.tensor(offset, dtype=torch.float32)


def dequantise_4bit(
    packed: UInt8[Tensor, " bytes"],
    absmax: Float32[Tensor, " blocks"],
    table: Float32[Tensor, " 16"],
    size: int,
    shape: tuple[int, ...],
) -> Float32[Tensor, "..."]:
    """A weight of `shape` from four-bit codes in blocks of `size`, the last of which may be smaller."""
    pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=1)  # both values of every byte
    values = pairs.index_select(0, packed.int()).reshape(-1)[: math.prod(shape)]
    blocks = len(values) // size
    full = blocks * size
    values[:full].view(blocks, size).mul_(absmax[:blocks, None])
    values[full:] *= absmax[blocks:]  # of one block or none
    return values.view(shape)


def dequantise_8bit(
    codes: Int8[Tensor, "rows columns"], absmax: Float[Tensor, " rows"]
) -> Float32[Tensor, "rows columns"]:
    """A weight from its codes and the largest magnitude of each row."""
    return codes.float().mul_(absmax.float()[:, None]).mul_(INVERSE_127)


def weights(stored: Stored, settings: None) -> Iterator[PackedWeight]:
    """The packed weights: those with a state of four bits, and those with scales of LLM.int8.

    Raises:
        ModelError: Tensors are missing, or do not fit together.
    """
    for kind in TABLES:
        for module, found in modules(stored, f"{STATE}{kind}"):
            yield _four_bit(stored, module, found, kind)
    for module, found in modules(stored, "SCB"):
        yield _eight_bit(stored, module, found)
    for key in stored.where:
        owner, _, last = key.rpartition(".")
        if last in ("absmax", "quant_map", "nested_absmax", "nested_quant_map") and not any(
            f"{owner}.quant_state.bitsandbytes__{kind}" in stored.where for kind in TABLES
        ):
            raise refuse_content(
                stored, key, "belongs to a weight that does not say how it was quantised",
                f"Expected beside it: {owner}.quant_state.bitsandbytes__nf4, or __fp4.",
            )  # fmt: skip


def _four_bit(stored: Stored, module: str, found: dict[str, str], kind: str) -> PackedWeight:
    state_key = found[f"{STATE}{kind}"]
    state = _state(stored, state_key)
    nested = ("weight.nested_absmax", "weight.nested_quant_map") if "nested_blocksize" in state else ()
    needed = ("weight", "weight.absmax", "weight.quant_map", *nested)
    parts = parts_of(stored, found, f"{STATE}{kind}", needed)
    shape, size = tuple(state["shape"]), state["blocksize"]
    if state["quant_type"] != kind or len(shape) != 2:
        raise refuse_content(
            stored, state_key, f"says {state['quant_type']!r} and the shape {list(shape)}",
            f"Expected: {kind!r} and a matrix.",
        )  # fmt: skip
    count = math.prod(shape)
    blocks = -(-count // size)
    code = parts["weight"]
    expect_dtype(stored, code, STORAGE)
    held = math.prod(stored.shape_of(code)) * stored.dtype_of(code).itemsize
    if not count <= 2 * held < count + 2 * stored.dtype_of(code).itemsize:
        raise refuse_content(
            stored, code, f"has {held:,} bytes", f"{list(shape)} values of four bits take {-(-count // 2):,}."
        )
    expect(stored, parts["weight.absmax"], (blocks,), (torch.uint8,) if nested else (torch.float32,))
    expect(stored, parts["weight.quant_map"], (16,), (torch.float32,))
    table = torch.tensor(TABLES[kind])
    if not torch.allclose(stored.read(parts["weight.quant_map"]), table, atol=1e-6):
        raise refuse_content(
            stored, parts["weight.quant_map"], f"is not the table of {kind}", f"Its values: {TABLES[kind]}."
        )
    if nested:
        outer = -(-blocks // state["nested_blocksize"])
        expect(stored, parts["weight.nested_absmax"], (outer,), (torch.float32,))
        expect(stored, parts["weight.nested_quant_map"], (256,), (torch.float32,))
    return PackedWeight(f"{module}.weight", shape, parts, partial(_from_4bit, state=state, table=table))


def _from_4bit(given: Mapping[str, Tensor], state: dict[str, Any], table: Tensor) -> Tensor:
    absmax = given["weight.absmax"]
    if "nested_blocksize" in state:
        map_, outer = given["weight.nested_quant_map"], given["weight.nested_absmax"]
        absmax = scales(absmax, map_, outer, state["nested_blocksize"], state["nested_offset"])
    packed = given["weight"].reshape(-1).view(torch.uint8)
    return dequantise_4bit(packed, absmax, table, state["blocksize"], tuple(state["shape"]))


def _state(stored: Stored, key: str) -> dict[str, Any]:
    """The JSON that says how a weight was quantised."""
    expect_dtype(stored, key, (torch.uint8,))
    try:
        state = json.loads(bytes(stored.read(key).tolist()))
        whole = [state["blocksize"], *state["shape"]]
        if "nested_blocksize" in state or "nested_offset" in state:
            whole.append(state["nested_blocksize"])
            state["nested_offset"] = float(state["nested_offset"])
        if not all(type(number) is int and number > 0 for number in whole):
            raise ValueError(f"not all of {whole} are positive whole numbers")
        state["quant_type"] = str(state["quant_type"])
    except (ValueError, KeyError, TypeError) as error:
        raise refuse_content(
            stored, key, "cannot be read", f"It should be JSON ({type(error).__name__}: {error})."
        ) from error
    return state


def _eight_bit(stored: Stored, module: str, found: dict[str, str]) -> PackedWeight:
    parts = parts_of(stored, found, "SCB", ("weight",), ("weight_format",))
    shape = matrix(stored, parts["weight"])
    expect_dtype(stored, parts["weight"], (torch.int8,))
    expect(stored, parts["SCB"], shape[:1], SCALES)
    if "weight_format" in parts and (order := stored.read(parts["weight_format"]).flatten().tolist()) != [
        ROW
    ]:
        raise refuse_content(
            stored, parts["weight_format"], f"says {order}", "Only weights that are stored row by row (0) are read."
        )  # fmt: skip
    return PackedWeight(f"{module}.weight", shape, parts, _from_8bit)


def _from_8bit(given: Mapping[str, Tensor]) -> Tensor:
    return dequantise_8bit(given["weight"], given["SCB"])


FORMAT = Format(settings_of, weights, scratch=8)
