"""What mitigations cost: the reference model with one on against the same model without, in one run.

    python -m benchmarks.mitigations --length 2048 --dtype float32 --threads 2

Prefill: a forward pass over `--length` tokens that fills a cache. Decode: one token after them. The model is the
reference model of `benchmarks.attention`, random weights, batch 1, SDPA. Repeats of all variants are interleaved,
so that a busy machine slows them alike; of each the smallest CPU time (all threads) counts. "knock-out" of the first
token is the dearest case there is where a sink holds much: its rows are computed again without it.

Methods on pictures are held against the same language model inside of a LLaVA with a small vision tower, a quarter of
the prompt being visual tokens ("plain, picture"); with random weights every token in twenty is taken for a sink, and no
head is left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from sinklens.mitigations import (
    ACT,
    GIFT,
    PAI,
    PAINT,
    VAR,
    AttentionScaling,
    KnockOut,
    KVBias,
    LearnedSink,
    NothingEdited,
    SinkGating,
    ValueBias,
    ZeroTuning,
)

from .attention import reference_model

Row = dict[str, float | str | int]
Way = Callable[[], AbstractContextManager[Any]]
PATCH, WIDTH = 14, 64


@dataclass(frozen=True)
class Subject:
    """A model with its prompt and the ways to run it; the first is the floor."""

    model: Any
    prompt: dict[str, torch.Tensor]
    ways: dict[str, Way]


def on_text(dtype: torch.dtype, length: int) -> Subject:
    """The reference model under the methods that need no picture."""
    model = reference_model(dtype)
    config: Any = model.config
    shape = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    bias = (torch.randn(shape) / 8).tolist()
    ways: dict[str, Way] = {"plain": nullcontext}
    for name, mitigation in {
        "zero-tuning, all heads": ZeroTuning(gamma=2.0),
        "zero-tuning, 1 layer": ZeroTuning(gamma=2.0, layers=[6]),
        "act, all heads": ACT(),
        "knock-out": KnockOut(),
        "scaling, 16 tokens": AttentionScaling(factor=0.5, positions=range(16)),
        "learned sink": LearnedSink(),
        "key and value bias": KVBias(key=bias, value=bias),
        "value bias": ValueBias(value=bias),
    }.items():
        ways[name] = lambda mitigation=mitigation: mitigation(model)
    ways["zero-tuning, then act"] = lambda: two(model)
    return Subject(model, {"input_ids": torch.randint(0, 8192, (1, length))}, ways)


def on_pictures(dtype: torch.dtype, length: int) -> Subject:
    """The reference model inside of a LLaVA under the methods on pictures."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    text = reference_model(dtype)
    side = max(2, math.isqrt(length // 4))
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, projection_dim=WIDTH, num_hidden_layers=3,
        num_attention_heads=4, image_size=PATCH * side, patch_size=PATCH,
    )  # fmt: skip
    token = text.config.vocab_size - 1
    config = LlavaConfig(
        text_config=text.config,
        vision_config=vision,
        image_token_index=token,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    config._attn_implementation = "sdpa"
    model = LlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()
    ids = torch.randint(0, token, (1, length))
    ids[:, length // 8 : length // 8 + side**2] = token
    pixels = torch.randn(1, 3, PATCH * side, PATCH * side, dtype=dtype)
    ways: dict[str, Way] = {"plain, picture": nullcontext}
    found = {"dims": (0,), "tau": 2.0}
    for name, mitigation in {
        "var": VAR(**found, floor=0.0, rho=0.0),
        "sink-gating": SinkGating(**found, sink=0.5, rest=1.5),
        "pai": PAI(),
        "paint": PAINT(),
        "gift": GIFT(),
    }.items():
        ways[name] = lambda mitigation=mitigation: mitigation(model)
    return Subject(model, {"input_ids": ids, "pixel_values": pixels}, ways)


@contextmanager
def two(model: Any) -> Iterator[Any]:
    """Two mitigations on top of each other; the effect is the second one's."""
    with ZeroTuning(gamma=2.0)(model), ACT()(model) as effect:
        yield effect


def measure(subjects: Iterable[Subject], repeats: int, steps: int) -> list[Row]:
    """One row per phase and variant: CPU and wall milliseconds, and the ratio to the plain model."""
    held = list(subjects)
    best: dict[tuple[str, str, str], float] = {}
    acted: dict[str, int] = {}

    def keep(phase: str, name: str, cpu: float, wall: float) -> None:
        for clock, value in (("cpu", cpu), ("wall", wall)):
            best[phase, name, clock] = min(best.get((phase, name, clock), math.inf), value)

    for repeat in range(repeats + 1):  # the first repeat warms up
        for subject in held:
            for name, way in subject.ways.items():
                with way() as effect, torch.no_grad():
                    for phase, cpu, wall in _timed(subject, steps):
                        if repeat:
                            keep(phase, name, cpu, wall)
                acted[name] = 0 if effect is None else getattr(effect, "rows_edited", 0)
    return [
        {
            "phase": phase,
            "variant": name,
            "against": next(iter(subject.ways)),
            "length": subject.prompt["input_ids"].shape[1],
            "cpu_ms": 1000 * best[phase, name, "cpu"],
            "wall_ms": 1000 * best[phase, name, "wall"],
            "cpu_ratio": best[phase, name, "cpu"] / best[phase, next(iter(subject.ways)), "cpu"],
            "rows_edited": acted[name],
        }
        for phase in ("prefill", "decode")
        for subject in held
        for name in subject.ways
    ]


def _timed(subject: Subject, steps: int) -> Iterator[tuple[str, float, float]]:
    """Phase, CPU and wall seconds of one prefill and of steps after it."""
    model, last = subject.model, subject.prompt["input_ids"][:, :1]
    c, w = time.process_time(), time.perf_counter()
    cache = model(**subject.prompt, use_cache=True, logits_to_keep=1).past_key_values
    yield "prefill", time.process_time() - c, time.perf_counter() - w
    for _ in range(steps):
        used = copy.deepcopy(cache)
        c, w = time.process_time(), time.perf_counter()
        model(input_ids=last, past_key_values=used, use_cache=True)
        yield "decode", time.process_time() - c, time.perf_counter() - w


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--text-only", action="store_true", help="leave the methods on pictures out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore", NothingEdited)  # the table says it
    dtype = getattr(torch, options.dtype)
    subjects = [on_text(dtype, options.length)]
    if not options.text_only:
        subjects.append(on_pictures(dtype, options.length))
    rows = measure(subjects, options.repeats, options.steps)
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
