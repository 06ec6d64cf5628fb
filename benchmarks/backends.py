"""What a backend costs: plain and traced passes through each library, against a plain pass of transformers, in one run.

    python -m benchmarks.backends --length 512 --dtype float32 --threads 2 --out benchmarks/results/backends.json

Same reference model, interleaving and measures as `profile.py`: random weights, batch 1, and of each way the smallest
CPU time (all threads) of the repeats counts. `plain` is the library's own forward pass, `traced` one that records
what primary sinks, massive activations and Super Experts read, `traced all` what all analyzers read. `ratio` is to
the plain pass of transformers with SDPA, `overhead` to the library's own plain pass. A bridge computes attention
itself, eagerly: that is in its plain pass already. `ndif` is not here: its time is the host's.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sinklens.core.manifest import package_version
from sinklens.tracers.backends import backend_of, open_with
from sinklens.tracers.executor import TracePlan, trace_batch

from .attention import peak_memory, reference_model
from .profile import FINDERS, batch_of, machine, signals_of

BACKENDS = ("hf", "transformer-lens", "nnsight")
WAYS = ("plain", "traced", "traced all")


def ways(model: Any, length: int) -> dict[tuple[str, str], Callable[[], object]]:
    """Ways to run the model, by backend and what is recorded; the first is the floor."""
    batch, found = batch_of(length), {}
    plans = {"traced": TracePlan(signals_of(FINDERS)), "traced all": TracePlan(signals_of("all"))}
    for name in BACKENDS:
        opened = open_with(copy.deepcopy(model), backend=name)
        found[name, "plain"] = lambda opened=opened: backend_of(opened).forward(opened, batch)
        for label, plan in plans.items():
            found[name, label] = lambda opened=opened, plan=plan: trace_batch(opened, batch, plan)
    return found


def measure(model: Any, length: int, repeats: int) -> list[dict[str, float | str]]:
    """One row per backend and way: CPU and wall seconds, the two ratios, peak memory above the model."""
    runs = ways(model, length)
    for run in runs.values():  # what is loaded or found out on first use is no cost of a pass
        run()
    cpu, wall, memory = ({key: math.inf for key in runs} for _ in range(3))
    for key, run in runs.items():
        with peak_memory() as peak:
            run()
        memory[key] = peak[0]
    for _ in range(repeats):
        for key, run in runs.items():
            c, w = time.process_time(), time.perf_counter()
            run()
            cpu[key] = min(cpu[key], time.process_time() - c)
            wall[key] = min(wall[key], time.perf_counter() - w)
    return [
        {
            "length": length,
            "backend": name,
            "way": way,
            "cpu_s": cpu[name, way],
            "wall_s": wall[name, way],
            "ratio": cpu[name, way] / cpu["hf", "plain"],
            "overhead": cpu[name, way] / cpu[name, "plain"],
            "peak_mb": memory[name, way],
        }
        for name, way in runs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="append the result to this JSON list")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(reference_model(getattr(torch, options.dtype)), options.length, options.repeats)
    for row in rows:
        print(
            f"T={row['length']:<6} {row['backend']:<17} {row['way']:<11} cpu {row['cpu_s']:8.3f} s  "
            f"x{row['ratio']:.3f} of plain hf  x{row['overhead']:.3f} of its own   peak {row['peak_mb']:8.0f} MB",
            flush=True,
        )
    if options.out is not None:
        about = machine(options.threads, options.dtype)
        about |= {name: package_version(name) for name in ("transformer-lens", "nnsight")}
        before = json.loads(options.out.read_text()) if options.out.exists() else []
        options.out.write_text(json.dumps([*before, {"machine": about, "rows": rows}], indent=1) + "\n")


if __name__ == "__main__":
    main()
