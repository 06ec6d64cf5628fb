"""What a profile costs: a traced forward pass, with every signal of the analyzers, against a plain one.

    python -m benchmarks.profile --lengths 512,1024,2048,4096,8192 --threads 2 --out benchmarks/results/profile.json

Same reference model, interleaving and measures as `attention.py`; here the whole product path runs: attention
statistics, hidden states, down projections, and the records. `fused` and `faithful` trace what primary sinks,
massive activations and Super Experts read; `fused all` and `faithful all` what all language analyzers read.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from sinklens.analyzers import chosen_analyzers
from sinklens.core.manifest import cpu_model
from sinklens.kernels.native import available
from sinklens.models.opening import open_model
from sinklens.models.spec import OpenedModel
from sinklens.tracers.attention import Mode
from sinklens.tracers.batch import Batch, forward
from sinklens.tracers.executor import TracePlan, trace_batch
from sinklens.tracers.signals import Signal

from .attention import memory_exponent, peak_memory, reference_model

WAYS = ("plain", "fused", "faithful", "fused all", "faithful all")
FINDERS = ("primary-sinks", "massive-activations", "super-experts")


def signals_of(names: tuple[str, ...] | str) -> frozenset[Signal]:
    """What the analyzers read."""
    return frozenset(signal for analyzer in chosen_analyzers(names) for signal in analyzer.needs)


def ways(opened: OpenedModel, batch: Batch) -> dict[str, Callable[[], object]]:
    """Ways to run the model; the first is the floor."""
    found: dict[str, Callable[[], object]] = {"plain": lambda: forward(opened.module, batch)}
    for label, signals in (("", signals_of(FINDERS)), (" all", signals_of("all"))):
        for mode in (Mode.FUSED, Mode.FAITHFUL):
            plan = TracePlan(signals, mode)
            found[f"{mode}{label}"] = lambda plan=plan: trace_batch(opened, batch, plan)
    return found


def batch_of(length: int) -> Batch:
    """One prompt of random tokens."""
    ids = torch.randint(0, 8192, (1, length), generator=torch.Generator().manual_seed(0))
    return Batch({"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool))


def measure(opened: OpenedModel, length: int, repeats: int) -> list[dict[str, float | str]]:
    """One row per way: CPU and wall seconds, ratio of CPU time to the first, peak memory above the model."""
    for run in ways(opened, batch_of(16)).values():  # what is loaded on first use is no cost of a profile
        run()
    runs = ways(opened, batch_of(length))
    cpu, wall, memory = ({name: math.inf for name in runs} for _ in range(3))
    for name, run in runs.items():
        with peak_memory() as peak:
            run()
        memory[name] = peak[0]
    for _ in range(repeats):
        for name, run in runs.items():
            c, w = time.process_time(), time.perf_counter()
            run()
            cpu[name] = min(cpu[name], time.process_time() - c)
            wall[name] = min(wall[name], time.perf_counter() - w)
    return [
        {
            "length": length,
            "variant": name,
            "cpu_s": cpu[name],
            "wall_s": wall[name],
            "cpu_ratio": cpu[name] / cpu["plain"],
            "peak_mb": memory[name],
        }
        for name in runs
    ]


def machine(threads: int, dtype: str) -> dict[str, object]:
    """What the ratios were measured on."""
    return {
        "cpu": cpu_model(),
        "threads": threads,
        "dtype": dtype,
        "row_pass": "compiled" if available() else "torch",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="512,1024,2048", help="comma-separated")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="append the result to this JSON list")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    opened = open_model(reference_model(getattr(torch, options.dtype)))
    rows: list[dict[str, float | str]] = []
    for length in map(int, options.lengths.split(",")):
        rows += measure(opened, length, options.repeats)
        for row in rows[-len(WAYS) :]:
            print(
                f"T={row['length']:<6} {row['variant']:<12} cpu {row['cpu_s']:8.3f} s  x{row['cpu_ratio']:.3f}"
                f"   wall {row['wall_s']:8.3f} s   peak {row['peak_mb']:8.0f} MB",
                flush=True,
            )
    lengths = {row["length"] for row in rows}
    exponents = {name: memory_exponent(rows, name) for name in WAYS} if len(lengths) > 1 else {}
    setting = machine(options.threads, options.dtype)
    print(setting, "memory ~ T^p:", {name: round(p, 2) for name, p in exponents.items()})
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        earlier = json.loads(options.out.read_text()) if options.out.exists() else []
        result = {"machine": setting, "memory_exponent": exponents, "rows": rows}
        options.out.write_text(json.dumps([*earlier, result], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
