"""Writes the golden files anew, where a format's library can be imported; nothing else needs this.

pip install --no-deps --target libraries bitsandbytes==0.50.2
PYTHONPATH=libraries:. python -m tests.packed.golden.make bitsandbytes
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Made = Iterator[tuple[str, dict[str, Tensor], Tensor]]


def bitsandbytes() -> Made:
    """bitsandbytes 0.50.2. Its operation in torch reads the weights: the kernel for processors of that version takes
    scales of other blocks where rows are no multiple of a block (values of a 3 x 96 weight in blocks of 64 were off by
    0.8 to 1.6 instead of 0.3 to 0.4)."""
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]
    from bitsandbytes.backends.default import ops  # pyright: ignore[reportMissingImports]

    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for shape, size in (((7, 9), 64), ((12, 77), 64), ((4, 320), 128)):
                if nested and size == 128 and kind == "nf4":
                    shape, size = (260, 65), 64  # more blocks than one nested block holds
                codes, state = functional.quantize_4bit(
                    torch.randn(shape), blocksize=size, quant_type=kind, compress_statistics=nested
                )
                held = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
                absmax = state.absmax
                if nested:
                    absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
                weight = ops._dequantize_4bit_compute(
                    codes.reshape(-1), absmax, state.code, size, shape, torch.float32
                )
                name = f"{kind}{'-nested' if nested else ''}-{shape[0]}x{shape[1]}-{size}"
                yield name, {**held, "weight": codes}, weight
    codes, largest, _ = functional.int8_vectorwise_quant(torch.randn(13, 29).half())
    yield "int8", {"weight": codes, "SCB": largest}, functional.int8_vectorwise_dequant(codes, largest)


MAKERS: dict[str, Callable[[], Made]] = {"bitsandbytes": bitsandbytes}


def main(name: str) -> None:
    torch.manual_seed(11)
    held: dict[str, Any] = {}
    for case, stored, weight in MAKERS[name]():
        held |= {f"{case}/in/{key}": value.clone().contiguous() for key, value in stored.items()}
        held[f"{case}/out"] = weight.clone().contiguous()
    path = Path(__file__).with_name(f"{name}.safetensors")
    save_file(held, path)
    print(f"{path.name}: {len(held)} tensors, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
