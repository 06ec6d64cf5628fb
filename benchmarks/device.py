"""The Triton kernels on a CUDA device, against flash attention alone.

    python -m benchmarks.device --lengths 8192,32768 --out benchmarks/results/device.json

One causal call of 32 query heads and 8 key heads, bfloat16, of width 64 and 128; median of the device's own times over
repeats that alternate. `fused` is output and default statistics, `sweep` statistics alone beside flash attention (its
time is added), `torch` the blocked torch path with output. Without a device it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from sinklens.kernels import triton_pass
from sinklens.kernels.blocked import attention_fused, attention_sweep
from sinklens.kernels.spec import AttentionCall, BlockPlan, Want

from .attention import COLUMN, DEFAULT

HEADS, KV_HEADS = 32, 8


def call_of(length: int, dim: int) -> AttentionCall:
    """Random tensors, laid out as projections put them out."""
    made = (torch.randn(1, length, heads, dim, device="cuda") for heads in (HEADS, KV_HEADS, KV_HEADS))
    query, key, value = (tensor.to(torch.bfloat16).transpose(1, 2) for tensor in made)
    return AttentionCall(query, key, value, dim**-0.5)


def ways(call: AttentionCall) -> dict[str, Callable[[], object]]:
    """Ways to attend; the first is the floor."""
    groups = torch.zeros(1, 1, call.key.shape[2], dtype=torch.bool, device="cuda")
    groups[..., 0] = True
    default, column = Want(DEFAULT, groups=groups), Want(COLUMN)
    if not triton_pass.serves(call, default):
        raise SystemExit("The Triton kernels do not serve this device; the log says why.")

    def flash() -> object:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(
                call.query, call.key, call.value, is_causal=True, scale=call.scale, enable_gqa=True
            )

    return {
        "flash": flash,
        "fused": lambda: attention_fused(call, default),
        "fused column": lambda: attention_fused(call, column),
        "sweep": lambda: (flash(), attention_sweep(call, default)),
        "sweep column": lambda: (flash(), attention_sweep(call, column)),
        "torch": lambda: attention_fused(call, default, BlockPlan(native=False)),
    }


def milliseconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measure(length: int, dim: int, repeats: int) -> list[dict[str, Any]]:
    """One row per way."""
    runs = ways(call_of(length, dim))
    for run in runs.values():
        run()  # compiles
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {way: [] for way in runs}
    for _ in range(repeats):
        for way, run in runs.items():
            times[way].append(milliseconds(run))
    middle = {way: statistics.median(found) for way, found in times.items()}
    return [
        {"length": length, "dim": dim, "way": way, "ms": ms, "ratio": ms / middle["flash"]}
        for way, ms in middle.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="8192,32768", help="comma-separated")
    parser.add_argument("--dims", default="64,128")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, help="append the result to this JSON list")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("not run: no CUDA device")
        return
    rows: list[dict[str, Any]] = []
    for dim in map(int, options.dims.split(",")):
        for length in map(int, options.lengths.split(",")):
            for row in measure(length, dim, options.repeats):
                rows.append(row)
                print(f"T={length:<6} dim {dim:<4} {row['way']:<13} {row['ms']:9.2f} ms  x{row['ratio']:.2f}")
    if options.out is not None:
        about = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        }
        before = json.loads(options.out.read_text("utf-8")) if options.out.exists() else []
        result = {"machine": about, "rows": rows}
        options.out.write_text(json.dumps([*before, result], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
