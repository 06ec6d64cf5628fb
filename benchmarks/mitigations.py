"""What mitigations cost: the reference model with one on against the same model without, in one run.

    python -m benchmarks.mitigations --length 2048 --dtype float32 --threads 2

Prefill: a forward pass over `--length` tokens that fills a cache. Decode: one token after them. The model is the
reference model of `benchmarks.attention`, random weights, batch 1, SDPA. Repeats of all variants are interleaved,
so that a busy machine slows them alike; of each the smallest CPU time (all threads) counts. "knock-out" of the first
token is the dearest case there is where a sink holds much: its rows are computed again without it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from sinklens.mitigations import ACT, AttentionScaling, KnockOut, LearnedSink, NothingEdited, ZeroTuning

from .attention import reference_model

Row = dict[str, float | str | int]


def variants(model: Any) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """Ways to run the model; the first is the floor."""
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {"plain": nullcontext}
    for name, mitigation in {
        "zero-tuning, all heads": ZeroTuning(gamma=2.0),
        "zero-tuning, 1 layer": ZeroTuning(gamma=2.0, layers=[6]),
        "act, all heads": ACT(),
        "knock-out": KnockOut(),
        "scaling, 16 tokens": AttentionScaling(factor=0.5, positions=range(16)),
        "learned sink": LearnedSink(),
    }.items():
        ways[name] = lambda mitigation=mitigation: mitigation(model)
    ways["zero-tuning, then act"] = lambda: two(model)
    return ways


@contextmanager
def two(model: Any) -> Iterator[Any]:
    """Two mitigations on top of each other; the effect is the second one's."""
    with ZeroTuning(gamma=2.0)(model), ACT()(model) as effect:
        yield effect


def measure(model: Any, length: int, repeats: int, steps: int) -> list[Row]:
    """One row per phase and variant: CPU and wall milliseconds, and the ratio to the plain model."""
    ids = torch.randint(0, 8192, (1, length + 1))
    ways = variants(model)
    best: dict[tuple[str, str, str], float] = {}
    acted: dict[str, int] = {}

    def keep(phase: str, name: str, cpu: float, wall: float) -> None:
        for clock, value in (("cpu", cpu), ("wall", wall)):
            best[phase, name, clock] = min(best.get((phase, name, clock), math.inf), value)

    for repeat in range(repeats + 1):  # the first repeat warms up
        for name, way in ways.items():
            with way() as effect, torch.no_grad():
                c, w = time.process_time(), time.perf_counter()
                cache = model(ids[:, :length], use_cache=True, logits_to_keep=1).past_key_values
                if repeat:
                    keep("prefill", name, time.process_time() - c, time.perf_counter() - w)
                for _ in range(steps):
                    used = copy.deepcopy(cache)
                    c, w = time.process_time(), time.perf_counter()
                    model(ids[:, length:], past_key_values=used, use_cache=True)
                    if repeat:
                        keep("decode", name, time.process_time() - c, time.perf_counter() - w)
            acted[name] = 0 if effect is None else effect.rows_edited
    return [
        {
            "phase": phase,
            "variant": name,
            "length": length,
            "cpu_ms": 1000 * best[phase, name, "cpu"],
            "wall_ms": 1000 * best[phase, name, "wall"],
            "cpu_ratio": best[phase, name, "cpu"] / best[phase, "plain", "cpu"],
            "rows_edited": acted[name],
        }
        for phase in ("prefill", "decode")
        for name in ways
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore", NothingEdited)  # the table says it
    rows = measure(
        reference_model(getattr(torch, options.dtype)), options.length, options.repeats, options.steps
    )
    if options.json:
        print(json.dumps({"dtype": options.dtype, "threads": options.threads, "rows": rows}, indent=1))
        return
    for row in rows:
        print(
            f"{row['phase']:8} {row['variant']:24} {row['cpu_ms']:9.1f} ms CPU {row['wall_ms']:9.1f} ms "
            f"ratio {row['cpu_ratio']:5.2f}  rows edited {row['rows_edited']}"
        )


if __name__ == "__main__":
    main()
