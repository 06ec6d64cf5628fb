"""What measuring costs: ways to look at attention, against a plain forward pass with SDPA, in one run.

    python -m benchmarks.cost --dtype float32 --lengths 512,1024,2048 --threads 2

Reference model and measures as in `attention.py`: random weights and tokens, batch 1, no cache, peak memory above the
loaded model. Rounds go through all ways in turn, so that a busy machine slows them alike; of each way the smallest CPU
time (all threads) counts, and `low` and `high` are the extremes of the ratios within a round. What stores maps is left
out, with the reason, where they do not fit the free memory.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sinklens.analyzers import chosen_analyzers
from sinklens.kernels.spec import BlockPlan
from sinklens.models.opening import open_model
from sinklens.models.spec import OpenedModel
from sinklens.tracers.attention import Mode
from sinklens.tracers.batch import Batch, forward
from sinklens.tracers.executor import TracePlan, trace_batch
from sinklens.tracers.signals import Signal

from .attention import peak_memory, reference_model
from .profile import batch_of, machine

PLAIN = "plain SDPA"
_TORCH, _HALF = BlockPlan(native=False), BlockPlan(score_dtype=torch.bfloat16)
# What sinklens records: analyzers ("" for the default ones), mode, blocks.
TRACES: dict[str, tuple[str, Mode, BlockPlan]] = {
    "fused": ("", Mode.FUSED, BlockPlan()),
    "fused, all signals": ("all", Mode.FUSED, BlockPlan()),
    "fused, pure torch": ("", Mode.FUSED, _TORCH),
    "fused, bf16 scores": ("", Mode.FUSED, _HALF),
    "fused, pure torch, bf16 scores": ("", Mode.FUSED, BlockPlan(native=False, score_dtype=torch.bfloat16)),
    "faithful": ("", Mode.FAITHFUL, BlockPlan()),
    "faithful, all signals": ("all", Mode.FAITHFUL, BlockPlan()),
}
# What others do: every attention map of a prompt, kept.
MAPS = ("eager, output_attentions", "TransformerLens, patterns", "nnsight, patterns")
WAYS = (PLAIN, *TRACES, *MAPS)
# Maps alive at once in one layer beside those that are kept: logits, their softmax, the copy in the model's type.
_SCRATCH_MAPS = 3


@dataclass
class Bench:
    """A model, and the copies of it that the other libraries wrap; made when first needed."""

    opened: OpenedModel
    _eager: Any = None
    _bridge: Any = None
    _nnsight: Any = None

    @property
    def eager(self) -> Any:
        if self._eager is None:
            self._eager = copy.deepcopy(self.opened.module)
            self._eager.set_attn_implementation("eager")
        return self._eager

    @property
    def bridge(self) -> Any:
        if self._bridge is None:
            from sinklens.tracers.backends.transformer_lens import bridge_around

            self._bridge = bridge_around(copy.deepcopy(self.opened.module))
        return self._bridge

    @property
    def nnsight(self) -> Any:
        if self._nnsight is None:
            from nnsight import NNsight

            self._nnsight = NNsight(self.eager)
        return self._nnsight

    def run(self, way: str, batch: Batch) -> Callable[[], object]:
        """One pass that way."""
        ids = batch.inputs["input_ids"]
        if way == PLAIN:
            return lambda: forward(self.opened.module, batch)
        if way in TRACES:
            names, mode, blocks = TRACES[way]
            plan = TracePlan(signals_of(names), mode, blocks=blocks)
            return lambda: trace_batch(self.opened, batch, plan)
        if way == MAPS[0]:
            return lambda: _quiet(lambda: self.eager(ids, use_cache=False, output_attentions=True))
        if way == MAPS[1]:
            return lambda: _quiet(
                lambda: self.bridge.run_with_cache(
                    ids, names_filter=lambda name: name.endswith("hook_pattern")
                )
            )
        return lambda: _quiet(lambda: nnsight_patterns(self.nnsight, ids))


def _quiet(run: Callable[[], object]) -> object:
    with torch.no_grad():
        return run()


def nnsight_patterns(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """The attention weights of every layer, saved."""
    import nnsight

    layers = range(len(model.model.layers))
    with model.trace(ids, use_cache=False):
        found = nnsight.save([model.model.layers[i].self_attn.output[1] for i in layers])
    return found


def signals_of(names: str) -> frozenset[Signal]:
    """What analyzers read; the default ones if none is named."""
    return frozenset(signal for analyzer in chosen_analyzers(names) for signal in analyzer.needs)


def free_memory() -> int:
    """Bytes that can be had without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def too_large(bench: Bench, way: str, length: int) -> str | None:
    """Why a way that keeps maps cannot run here."""
    if way not in MAPS:
        return None
    config: Any = bench.opened.module.config
    size = next(bench.opened.module.parameters()).element_size()
    one = config.num_attention_heads * length**2
    need = one * (config.num_hidden_layers * size + _SCRATCH_MAPS * 4)
    free = free_memory()
    if need < 0.8 * free:
        return None
    return f"maps need {need / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"


def measure(bench: Bench, ways: Iterable[str], length: int, rounds: int) -> list[dict[str, Any]]:
    """One row per way; the first way is the floor."""
    rows = [{"length": length, "way": way, "skipped": too_large(bench, way, length)} for way in ways]
    runs = {row["way"]: bench.run(row["way"], batch_of(length)) for row in rows if row["skipped"] is None}
    cpu, wall = ({way: [] for way in runs} for _ in range(2))
    memory = {}
    for number in range(rounds):
        for way, run in runs.items():
            if number == 0:
                with peak_memory() as peak:
                    _time(run, cpu[way], wall[way])
                memory[way] = peak[0]
            else:
                _time(run, cpu[way], wall[way])
    floor = next(iter(runs))
    for row in rows:
        if (way := row["way"]) in runs:
            pairs = [one / base for one, base in zip(cpu[way], cpu[floor], strict=True)]
            row |= {
                "cpu_s": min(cpu[way]),
                "wall_s": min(wall[way]),
                "ratio": min(cpu[way]) / min(cpu[floor]),
                "low": min(pairs),
                "high": max(pairs),
                "peak_mb": memory[way],
            }
    return rows


def _time(run: Callable[[], object], cpu: list[float], wall: list[float]) -> None:
    c, w = time.process_time(), time.perf_counter()
    run()
    cpu.append(time.process_time() - c)
    wall.append(time.perf_counter() - w)


def exponents(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """By way: slope of log peak memory over log length (1 is linear), where there are three lengths or more."""
    found = {}
    rows = [row for row in rows if row.get("peak_mb", 0) > 0]
    for way in dict.fromkeys(row["way"] for row in rows):
        points = [(math.log(r["length"]), math.log(r["peak_mb"])) for r in rows if r["way"] == way]
        if len(points) >= 3:
            mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
            spread = sum((x - mean_x) ** 2 for x, _ in points)
            found[way] = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="512,1024,2048", help="comma-separated")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--ways", default=";".join(WAYS), help=f"of {'; '.join(WAYS)}, with ; between")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="append the result to this JSON list")
    options = parser.parse_args()
    ways = [way.strip() for way in options.ways.split(";")]
    if unknown := [way for way in ways if way not in WAYS]:
        parser.error(f"there is no way {unknown[0]!r}; choose of {'; '.join(WAYS)}")
    ways = [PLAIN, *(way for way in ways if way != PLAIN)]
    torch.set_num_threads(options.threads)
    model = reference_model(getattr(torch, options.dtype), options.layers)
    bench, rows = Bench(open_model(model)), []
    for way in ways:  # what is loaded or compiled on first use is no cost of a pass
        bench.run(way, batch_of(16))()
    for length in map(int, options.lengths.split(",")):
        for row in measure(bench, ways, length, options.rounds):
            rows.append(row)
            said = row["skipped"] or f"x{row['ratio']:.3f} of CPU time   peak {row['peak_mb']:7.0f} MB"
            print(f"{options.dtype}  T={length:<6} {row['way']:<32} {said}", flush=True)
    if options.out is not None:
        result = {
            "machine": machine(options.threads, options.dtype) | {"layers": options.layers},
            "rows": rows,
        }
        before = json.loads(options.out.read_text("utf-8")) if options.out.exists() else []
        options.out.write_text(json.dumps([*before, result], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
