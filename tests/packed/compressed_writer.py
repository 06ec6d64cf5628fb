"""Weights as compressed-tensors stores them, and the values they stand for, written out from the format."""

from __future__ import annotations

import torch
from torch import Tensor

from .naive import drawn, packed_columns, packed_rows, scales


def compressed(
    shape: tuple[int, ...],
    generator: torch.Generator,
    bits: int,
    strategy: str,
    *,
    size: int = 0,
    block: tuple[int, int] = (0, 0),
    symmetric: bool = True,
    packed: bool = True,
    kind: str = "int",
    shuffled: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[dict[str, Tensor], Tensor]:
    """One weight; `shuffled` for groups that are not those of each input's place."""
    rows, inputs = shape
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    extent = {
        "tensor": (1, 1), "channel": (rows, 1), "group": (rows, inputs // max(1, size)),
        "block": (-(-rows // max(1, block[0])), -(-inputs // max(1, block[1]))),
    }[strategy]  # fmt: skip
    of = scales(extent, generator, dtype, 0.1 / 2**bits)
    zeros = torch.zeros(extent, dtype=torch.int64) if symmetric else drawn(extent, low, high, generator)
    if kind == "float":
        codes = (100 * torch.randn(shape, generator=generator)).clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        codes = drawn(shape, low, high, generator).to(torch.int8)
    stored = {"weight_scale": of.reshape(-1) if strategy == "tensor" else of}
    if packed:
        stored["weight_packed"] = packed_rows(codes.long() - low, bits)
        stored["weight_shape"] = torch.tensor(shape)
    else:
        stored["weight"] = codes
    if not symmetric:
        across = packed and strategy != "tensor"
        plain = zeros.to(torch.int8).reshape(stored["weight_scale"].shape)
        stored["weight_zero_point"] = packed_columns(zeros - low, bits) if across else plain
    group_of = torch.arange(inputs) // max(1, size)
    if shuffled:
        group_of = group_of[torch.randperm(inputs, generator=generator)]
        stored["weight_g_idx"] = group_of.to(torch.int32)
    down = torch.arange(rows) // max(1, block[0]) if strategy == "block" else torch.arange(rows)
    across_ = {"group": group_of, "block": torch.arange(inputs) // max(1, block[1])}.get(strategy)
    weight = torch.empty(rows, inputs)
    for r in range(rows):
        row = 0 if strategy == "tensor" else int(down[r])
        columns = torch.zeros(inputs, dtype=torch.int64) if across_ is None else across_
        weight[r] = (codes[r].float() - zeros[row, columns].float()) * of[row, columns].float()
    return stored, weight
