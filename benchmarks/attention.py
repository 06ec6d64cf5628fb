"""What attention statistics cost: a forward pass with them against the same forward pass without.

    python -m benchmarks.attention --lengths 512,1024,2048,4096 --dtype float32 --threads 2

Reference model: a Llama of 12 layers, 12 heads (4 key heads) of width 64, hidden 768, intermediate 2048, vocabulary
8192, random weights, batch 1, no cache. Repeats of all variants are interleaved, so that a busy machine slows them
alike; of each the smallest CPU time (all threads) counts. Peak memory is above the loaded model, Linux only.
"torch" variants do without the compiled row pass, "column" variants take received attention only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sinklens.kernels.spec import AttentionCall, BlockPlan, Stat, Want
from sinklens.kernels.workspace import workspace
from sinklens.tracers.attention import AttentionTap, Mode, Site

DEFAULT = frozenset(
    {
        Stat.RECEIVED,
        Stat.TOP1,
        Stat.DIAGONAL,
        Stat.ENTROPY,
        Stat.DISTANCE,
        Stat.ROW_MAX,
        Stat.GROUP_MASS,
    }
)
COLUMN = frozenset({Stat.RECEIVED})


def reference_model(dtype: torch.dtype, layers: int = 12) -> LlamaForCausalLM:
    """The model all ratios refer to; with fewer layers where lengths are long."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=8192,
        max_position_embeddings=131072,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def tap(
    model: LlamaForCausalLM, mode: Mode, stats: frozenset[Stat], *, native: bool = True
) -> Callable[[], AbstractContextManager[object]]:
    """Attention statistics of every layer while attached; they are computed and dropped."""
    attention = [module for name, module in model.named_modules() if name.endswith("self_attn")]
    sites: dict[torch.nn.Module, Site] = {module: Site("text", i) for i, module in enumerate(attention)}

    def asks(_site: Site, call: AttentionCall) -> Want:
        groups = torch.zeros(1, call.key.shape[0], call.key.shape[2], dtype=torch.bool)
        groups[..., 0] = True
        return Want(stats, groups=groups)

    observed = AttentionTap(sites, asks, lambda *_: None, mode=mode, plan=BlockPlan(native=native))
    return lambda: observed.attached(model)


def variants(model: LlamaForCausalLM) -> dict[str, Callable[[], AbstractContextManager[object]]]:
    """Ways to run the model; the first is the floor."""
    return {
        "plain": nullcontext,
        "fused": tap(model, Mode.FUSED, DEFAULT),
        "sweep": tap(model, Mode.FAITHFUL, DEFAULT),
        "fused torch": tap(model, Mode.FUSED, DEFAULT, native=False),
        "sweep torch": tap(model, Mode.FAITHFUL, DEFAULT, native=False),
        "fused column": tap(model, Mode.FUSED, COLUMN),
        "sweep column": tap(model, Mode.FAITHFUL, COLUMN),
    }


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Largest resident memory inside the block above that at its start, in MB, appended to the list."""
    gc.collect()
    workspace().release()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before, result = _status("VmRSS"), []
    yield result
    result.append((_status("VmHWM") - before) / 1024)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def measure(
    model: LlamaForCausalLM, length: int, names: list[str], repeats: int
) -> list[dict[str, float | str]]:
    """One row per variant: CPU and wall seconds, ratio to the first, peak memory."""
    ids = torch.randint(0, 8192, (1, length))
    ways = {name: way for name, way in variants(model).items() if name in names}
    cpu, wall, memory = ({name: math.inf for name in ways} for _ in range(3))

    def once(name: str) -> None:
        with ways[name](), torch.no_grad():
            model(ids, use_cache=False)

    for name in ways:
        with peak_memory() as peak:
            once(name)
        memory[name] = peak[0]
    for _ in range(repeats):
        for name in ways:
            c, w = time.process_time(), time.perf_counter()
            once(name)
            cpu[name] = min(cpu[name], time.process_time() - c)
            wall[name] = min(wall[name], time.perf_counter() - w)
    floor = next(iter(ways))
    return [
        {
            "length": length,
            "variant": name,
            "cpu_s": cpu[name],
            "wall_s": wall[name],
            "cpu_ratio": cpu[name] / cpu[floor],
            "peak_mb": memory[name],
        }
        for name in ways
    ]


def memory_exponent(rows: list[dict[str, float | str]], variant: str) -> float:
    """Slope of log peak memory over log length (1 is linear), or NaN with fewer than two lengths."""
    points = [
        (math.log(float(row["length"])), math.log(float(row["peak_mb"])))
        for row in rows
        if row["variant"] == variant
    ]
    if len(points) < 2:
        return math.nan
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="512,1024,2048", help="comma-separated, up to 8192 and more")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--variants", default="plain,fused,sweep", help="the first is the floor of the ratios"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, names = reference_model(getattr(torch, options.dtype)), options.variants.split(",")
    rows: list[dict[str, float | str]] = []
    for length in map(int, options.lengths.split(",")):
        rows += measure(model, length, names, options.repeats)
        if not options.json:
            for row in rows[-len(names) :]:
                print(
                    f"T={row['length']:<6} {row['variant']:<13} cpu {row['cpu_s']:8.3f} s  x{row['cpu_ratio']:.3f}"
                    f"   wall {row['wall_s']:8.3f} s   peak {row['peak_mb']:8.0f} MB",
                    flush=True,
                )
    exponents = {name: memory_exponent(rows, name) for name in names}
    setting = {"dtype": options.dtype, "threads": options.threads, "torch": torch.__version__}
    if options.json:
        print(json.dumps({**setting, "rows": rows, "memory_exponent": exponents}, indent=1))
    else:
        print(setting, "memory ~ T^p:", {name: round(p, 2) for name, p in exponents.items()})


if __name__ == "__main__":
    main()
