"""Long contexts: one long prompt through the whole of `sinklens profile`, against a plain forward pass.

    python -m benchmarks.long_context --model reference --lengths 4096,8192,16384,32768
    python -m benchmarks.long_context --model small --lengths 8192,16384,32768,65536,131072

`reference` is the model of `attention.py` (12 layers, 12 heads of width 64, 4 key heads); `small` has 2 layers, 2 heads
of width 32, 1 key head. Random weights and tokens, float32, batch 1. Each length and way is a process of its own.
"plain" is the forward pass alone; "profile" everything from the self-check to the report with the default analyzers of
text (fused mode, no experiments), "sampled" the same from 2048 query rows (faithful mode). Peak memory is what the
process held at most above the loaded model; `memory_exponent` is the slope of its logarithm over that of the length.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from sinklens.core.manifest import cpu_model
from sinklens.kernels.native import available

from .attention import peak_memory, reference_model

WAYS = ("plain", "profile", "sampled")
SAMPLED_ROWS = 2048
VOCABULARY = 8192


def small_model() -> LlamaForCausalLM:
    """A model for 128k tokens in minutes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=VOCABULARY,
        max_position_embeddings=131072,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM._from_config(config, dtype=torch.float32).eval()


def model_named(name: str) -> LlamaForCausalLM:
    return reference_model(torch.float32) if name == "reference" else small_model()


def once(name: str, length: int, way: str) -> dict[str, Any]:
    """One measurement, in this process."""
    import sinklens as sl

    model = model_named(name)
    tokens = torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(0))

    def profiled(n: int, folder: Path) -> Any:
        how: dict[str, Any] = {"mode": "fused"} if way == "profile" else {"sample_queries": SAMPLED_ROWS}
        return sl.profile(model, prompts=[tokens[:n].tolist()], seq_len=n, verify=False, out=folder, **how)

    def plain(n: int) -> Any:
        with torch.no_grad():
            return model(tokens[None, :n], use_cache=False, logits_to_keep=1)

    with tempfile.TemporaryDirectory() as scratch:
        # What is loaded or built on first use is no cost of a long context.
        plain(128) if way == "plain" else profiled(128, Path(scratch) / "short")
        wall, processor = time.perf_counter(), time.process_time()
        with peak_memory() as peak:
            run = plain(length) if way == "plain" else profiled(length, Path(scratch) / "long")
        found = {
            "model": name,
            "length": length,
            "way": way,
            "cpu_s": time.process_time() - processor,
            "wall_s": time.perf_counter() - wall,
            "peak_mb": peak[0],
        }
        if way != "plain":
            manifest = run.document["manifest"]
            found |= {
                "query_blocks": manifest["query_blocks"],
                "verdict": run.verdict.text[:200],
                "checks_passed": all(check.passed for check in run.checks),
            }
    return found


def exponent(rows: list[dict[str, Any]], way: str) -> float:
    """Slope of log peak memory over log length; NaN for fewer than two lengths."""
    points = [(math.log(row["length"]), math.log(row["peak_mb"])) for row in rows if row["way"] == way]
    if len(points) < 2:
        return math.nan
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def measured(name: str, length: int, way: str, threads: int) -> dict[str, Any]:
    """`once` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.long_context", "--one", way]
    command += ["--model", name, "--lengths", str(length), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way} at {length} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="small", choices=["small", "reference"])
    parser.add_argument("--lengths", default="8192,16384,32768", help="comma-separated")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="append the result to this JSON list")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lengths = [int(length) for length in options.lengths.split(",")]
    if options.one:
        print(json.dumps(once(options.model, lengths[0], options.one)))
        return
    rows: list[dict[str, Any]] = []
    for length in lengths:
        for way in options.ways.split(","):
            row = measured(options.model, length, way, options.threads)
            floor = next((r["cpu_s"] for r in rows if r["length"] == length and r["way"] == "plain"), None)
            row["cpu_ratio"] = 1.0 if way == "plain" else row["cpu_s"] / floor if floor else None
            rows.append(row)
            print(
                f"T={length:<7} {way:<8} cpu {row['cpu_s']:8.1f} s  x{row['cpu_ratio'] or math.nan:.2f}   "
                f"wall {row['wall_s']:8.1f} s   peak {row['peak_mb']:8.0f} MB",
                flush=True,
            )
    exponents = {way: exponent(rows, way) for way in options.ways.split(",")}
    print("memory ~ T^p:", {way: round(p, 2) for way, p in exponents.items()})
    if options.out:
        result = {
            "machine": {
                "cpu": cpu_model(),
                "threads": options.threads,
                "row_pass": "compiled" if available() else "torch",
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
                "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            },
            "sampled_rows": SAMPLED_ROWS,
            "memory_exponent": {way: None if math.isnan(p) else p for way, p in exponents.items()},
            "rows": rows,
        }
        earlier = json.loads(options.out.read_text()) if options.out.exists() else []
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps([*earlier, result], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
