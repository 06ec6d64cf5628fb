"""Weights as bitsandbytes stores them, and the values they stand for, written out from the format."""

from __future__ import annotations

import json
import math

import torch
from torch import Tensor

from .naive import drawn, scales

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [v / 12 for v in (0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3)]
TABLES = {"nf4": NF4, "fp4": FP4}


def four_bit(
    shape: tuple[int, ...],
    generator: torch.Generator,
    kind: str,
    *,
    nested: bool,
    size: int = 64,
    storage: torch.dtype = torch.uint8,
) -> tuple[dict[str, Tensor], Tensor]:
    count, outer = math.prod(shape), 32
    codes = drawn((count,), 0, 15, generator).tolist()
    blocks = -(-count // size)
    state = {"quant_type": kind, "blocksize": size, "dtype": "bfloat16", "shape": list(shape)}
    table = torch.tensor(TABLES[kind], dtype=torch.float32)
    stored = {"weight.quant_map": table}
    if nested:
        again, map_ = drawn((blocks,), 0, 255, generator), torch.linspace(-1, 1, 256)
        above, offset = scales((-(-blocks // outer),), generator, torch.float32, 0.02), 0.05
        absmax = [
            map_[code] * above[i // outer] + torch.tensor(offset) for i, code in enumerate(again.tolist())
        ]
        state |= {"nested_blocksize": outer, "nested_dtype": "float32", "nested_offset": offset}
        stored |= {
            "weight.absmax": again.to(torch.uint8),
            "weight.nested_absmax": above,
            "weight.nested_quant_map": map_,
        }
    else:
        stored["weight.absmax"] = scales((blocks,), generator, torch.float32, 0.05)
        absmax = list(stored["weight.absmax"])
    bytes_ = [
        high << 4 | low for high, low in zip(codes[0::2], [*codes[1::2], *([0] * (count % 2))], strict=True)
    ]
    bytes_ += [0] * (-len(bytes_) % storage.itemsize)
    stored["weight"] = torch.tensor(bytes_, dtype=torch.uint8).view(storage)[:, None]
    stored[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(
        list(json.dumps(state).encode()), dtype=torch.uint8
    )
    spread = torch.stack(absmax).repeat_interleave(size)[:count]
    return stored, (table[codes] * spread).reshape(shape)


def eight_bit(shape: tuple[int, ...], generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    codes = drawn(shape, -127, 127, generator).to(torch.int8)
    largest = scales(shape[:1], generator, torch.float32, 0.05)
    stored = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, codes.float() * largest[:, None] * 7.874015718698502e-3
