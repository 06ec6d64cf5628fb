"""The cases of the golden file of compressed-tensors: format, scheme of the weights, rows, inputs."""

from __future__ import annotations

from typing import Any


def _scheme(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "dynamic": False,
        **more,
    }


COMPRESSED: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "pack-4-group": ("pack-quantized", _scheme(4, "group", group_size=12), 7, 48),
    "pack-4-group-asymmetric": (
        "pack-quantized",
        _scheme(4, "group", group_size=12, symmetric=False),
        19,
        36,
    ),
    "pack-4-channel-asymmetric": ("pack-quantized", _scheme(4, "channel", symmetric=False), 11, 29),
    "pack-3-group-asymmetric": (
        "pack-quantized",
        _scheme(3, "group", group_size=20, symmetric=False),
        13,
        60,
    ),
    "pack-5-channel": ("pack-quantized", _scheme(5, "channel"), 9, 41),
    "pack-8-group": ("pack-quantized", _scheme(8, "group", group_size=9), 5, 27),
    "pack-8-tensor": ("pack-quantized", _scheme(8, "tensor"), 5, 27),
    "int-8-channel": ("int-quantized", _scheme(8, "channel"), 7, 29),
    "int-8-tensor-asymmetric": ("int-quantized", _scheme(8, "tensor", symmetric=False), 7, 29),
    "int-8-channel-asymmetric": ("int-quantized", _scheme(8, "channel", symmetric=False), 7, 29),
    "naive-4-group": ("naive-quantized", _scheme(4, "group", group_size=5), 7, 30),
    "float-8-tensor": ("float-quantized", _scheme(8, "tensor", type="float"), 7, 29),
    "float-8-channel": ("float-quantized", _scheme(8, "channel", type="float"), 7, 29),
    "float-8-block": ("float-quantized", _scheme(8, "block", type="float", block_structure=[4, 8]), 10, 29),
}
