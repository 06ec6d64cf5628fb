"""What the libraries of the formats wrote and read, to compare with; they are not there when tests run.

Each file has stored tensors as `case/in/name` and the dequantised weight as `case/out`; `make.py` wrote it.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor


def golden(name: str) -> dict[str, tuple[dict[str, Tensor], Tensor]]:
    """The cases of a file: stored tensors and the weight."""
    held = load_file(Path(__file__).with_name(f"{name}.safetensors"))
    return {
        case: (
            {
                key.removeprefix(f"{case}/in/"): value
                for key, value in held.items()
                if key.startswith(f"{case}/in/")
            },
            held[f"{case}/out"],
        )
        for case in sorted({key.partition("/")[0] for key in held})
    }
