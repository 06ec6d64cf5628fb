"""The Triton kernels become machine code for CUDA devices, for which no device is needed; run by `test_triton.py`."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from sinklens.kernels import triton_kernels

POINTERS = {
    **dict.fromkeys(("query", "key", "value", "output"), "own"),
    **dict.fromkeys(("groups", "live", "tail", "probe"), "*u8"),
    **dict.fromkeys(("spans", "place"), "*i32"),
}
FLOATS = {"scale", "cap", "lowest", "window"}
INTEGERS = {"heads", "group", "queries", "keys", "n_groups", "band_first", "band_last"}


def machine_code(kernel: Any, constants: dict[str, int | bool], mask: str, own: str, capability: int) -> Any:
    """Compile with every statistic asked for; everything that is no number or constant is a float32 array."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(inspect.signature(kernel.fn).parameters)
    constants = {name: constants.get(name, True) for name in names if name.isupper()}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name == "mask":
            return mask
        if name in POINTERS:
            return own if POINTERS[name] == "own" else POINTERS[name]
        return "fp32" if name in FLOATS else "i32" if name in INTEGERS or name[1:2] == "_" else "*fp32"

    signature = {name: kind(name) for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


@pytest.mark.parametrize("kernel", [triton_kernels.by_row, triton_kernels.by_key], ids=["by_row", "by_key"])
@pytest.mark.parametrize(
    ("capability", "dtype", "mask"), [(80, torch.float32, 2), (90, torch.bfloat16, 1), (90, torch.float16, 0)]
)
def test_machine_code(kernel: Any, capability: int, dtype: torch.dtype, mask: int) -> None:
    own = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    rows, keys = (64, 32) if dtype == torch.float32 else (64, 64)
    sizes = {"DIM": 128, "VALUE_DIM": 128, "D": 128, "V": 128, "G": 2, "ROWS": rows, "KEYS": keys}
    constants = {**sizes, "MASK": mask, "CAUSAL": mask == 0, "WIDE": False}
    assert machine_code(kernel, constants, ("*u8", "*u8", own)[mask], own, capability)
