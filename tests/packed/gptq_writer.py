"""Weights as GPTQ and AWQ store them, and the values they stand for, written out from the formats."""

from __future__ import annotations

import torch
from torch import Tensor

from .naive import drawn, packed_columns, packed_rows, scales

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def gptq(
    shape: tuple[int, ...],
    generator: torch.Generator,
    bits: int,
    *,
    size: int,
    less_one: bool = True,
    index: str = "plain",
    dtype: torch.dtype = torch.float16,
) -> tuple[dict[str, Tensor], Tensor]:
    """One weight.

    Args:
        shape: Outputs and inputs.
        size: Inputs of a group; -1 for all.
        index: `plain`, `shuffled` (act order) or `absent`.
    """
    outputs, inputs = shape
    size = inputs if size == -1 else size
    groups = -(-inputs // size)
    codes = drawn((inputs, outputs), 0, 2**bits - 1, generator)
    zeros = drawn((groups, outputs), int(less_one), 2**bits - 1, generator)
    of = scales((groups, outputs), generator, dtype, 0.1 / 2**bits)
    group_of = torch.arange(inputs) // size
    if index == "shuffled":
        group_of = group_of[torch.randperm(inputs, generator=generator)]
    stored = {
        "qweight": packed_columns(codes, bits),
        "qzeros": packed_rows(zeros - int(less_one), bits),
        "scales": of,
    }
    if index != "absent":
        stored["g_idx"] = group_of.to(torch.int32)
    weight = torch.empty(inputs, outputs)
    for i, group in enumerate(group_of.tolist()):
        weight[i] = ((codes[i] - zeros[group]).double() * of[group].double()).float()
    return stored, weight.T.contiguous()


def awq(shape: tuple[int, ...], generator: torch.Generator, *, size: int) -> tuple[dict[str, Tensor], Tensor]:
    outputs, inputs = shape
    size = inputs if size == -1 else size
    codes = drawn((inputs, outputs), 0, 15, generator)
    zeros = drawn((inputs // size, outputs), 0, 15, generator)
    of = scales((inputs // size, outputs), generator, torch.float16, 0.01)

    def interleaved(numbers: Tensor) -> Tensor:
        places = [8 * word + output for word in range(outputs // 8) for output in AWQ_ORDER]
        return packed_rows(numbers[:, places], 4)

    stored = {"qweight": interleaved(codes), "qzeros": interleaved(zeros), "scales": of}
    weight = torch.empty(inputs, outputs)
    for i in range(inputs):
        weight[i] = ((codes[i] - zeros[i // size]).double() * of[i // size].double()).float()
    return stored, weight.T.contiguous()
