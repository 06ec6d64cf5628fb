"""The whole suite: every figure of `docs/performance.md`, as ratios measured in one run.

    python -m benchmarks              # make bench; about half an hour on two cores
    python -m benchmarks --only cost-float32,start
    python -m benchmarks --quick      # a smoke test of a few seconds; its figures mean nothing
    python -m benchmarks --write      # table, plot and page again from the results that are there

Each part is a process of its own. Results go to `benchmarks/results/suite.json` with the machine's description, and
from there to `suite.md`, `cost.svg` and `docs/performance.md`. A part that is not there or cannot run here is named
with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sinklens.core.manifest import cpu_model

from . import summary

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Part:
    """A benchmark that appends its result to a JSON list (`--out`).

    Attributes:
        minutes: What it took on two cores without other work.
        quick: Options of the smoke test; None leaves it out of that.
    """

    name: str
    module: str
    options: tuple[str, ...]
    minutes: float
    quick: tuple[str, ...] | None = None


_LONG = "fused;fused, all signals;fused, pure torch;faithful"
_SHORT = ("--lengths", "48,64", "--layers", "1", "--rounds", "1", "--threads", "1", "--ways")
PARTS = (
    Part(
        "cost-float32",
        "cost",
        (
            *("--lengths", "512,1024,2048", "--rounds", "4", "--ways"),
            "fused;fused, all signals;fused, pure torch;faithful;faithful, all signals;"
            "eager, output_attentions;TransformerLens, patterns;nnsight, patterns",
        ),
        3,
        (*_SHORT, "fused;faithful;eager, output_attentions;TransformerLens, patterns;nnsight, patterns"),
    ),
    Part(
        "cost-float32-4096",
        "cost",
        ("--lengths", "4096", "--rounds", "1", "--ways", f"{_LONG};eager, output_attentions"),
        1.2,
    ),
    Part("cost-float32-8192", "cost", ("--lengths", "8192", "--rounds", "2", "--ways", _LONG), 4),
    Part(
        "cost-bfloat16",
        "cost",
        (
            *("--dtype", "bfloat16", "--lengths", "2048,8192", "--rounds", "2", "--ways"),
            "fused;fused, bf16 scores;fused, pure torch;fused, pure torch, bf16 scores",
        ),
        2,
        (*_SHORT, "fused;fused, pure torch, bf16 scores", "--dtype", "bfloat16"),
    ),
    Part(
        "cost-32k",
        "cost",
        ("--layers", "2", "--lengths", "16384,32768", "--rounds", "1", "--ways", "fused;fused, all signals"),
        1.6,
    ),
    Part(
        "long-context",
        "long_context",
        ("--model", "small", "--lengths", "8192,32768,131072", "--ways", "plain,profile"),
        2,
    ),
    Part("streaming", "streaming", ("--layers", "8", "--prompts", "16", "--rounds", "2"), 12),
    Part("start", "start", (), 1, ("--repeats", "1", "--prompts", "2")),
    Part("device", "device", (), 0.1, ()),
)


def run(part: Part, *, quick: bool) -> dict[str, Any]:
    """The part's last result, or `{"skipped": reason}`."""
    if not (ROOT / "benchmarks" / f"{part.module}.py").exists():
        return {"skipped": f"benchmarks/{part.module}.py is not there"}
    options = part.quick if quick else part.options
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{part.module}", *(options or ())]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        ran = subprocess.run(
            [*command, "--out", str(out)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        print(ran.stdout, end="", flush=True)
        if ran.returncode:
            return {"skipped": f"it failed with exit code {ran.returncode}"}
        if not out.exists():
            return {"skipped": (ran.stdout.strip().splitlines() or ["it wrote nothing"])[-1]}
        result = json.loads(out.read_text("utf-8"))
        return result[-1] if isinstance(result, list) else result


def about() -> dict[str, Any]:
    """The machine, as far as figures depend on it."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    memory = next((int(line.split()[1]) for line in lines if line.startswith("MemTotal:")), 0)
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**20, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def chosen(names: str | None, *, quick: bool) -> list[Part]:
    """The parts asked for.

    Raises:
        SystemExit: There is no such part.
    """
    parts = [part for part in PARTS if not quick or part.quick is not None]
    if names is None:
        return parts
    asked = names.split(",")
    if unknown := set(asked) - {part.name for part in PARTS}:
        raise SystemExit(
            f"There is no part {sorted(unknown)[0]!r}; there are {', '.join(p.name for p in PARTS)}."
        )
    return [part for part in parts if part.name in asked]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="comma-separated names of parts; the results of the others are kept")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test; writes to --results only if given"
    )
    parser.add_argument("--write", action="store_true", help="run nothing, write table, plot and page again")
    parser.add_argument("--results", type=Path, help="folder of the results [default: benchmarks/results]")
    options = parser.parse_args(argv)
    folder = options.results or (
        Path(tempfile.mkdtemp(prefix="sinklens-bench-")) if options.quick else RESULTS
    )
    file = folder / "suite.json"
    suite = json.loads(file.read_text("utf-8")) if file.exists() else {"machine": {}, "parts": {}}
    if not options.write:
        parts = chosen(options.only, quick=options.quick)
        if options.only is None:
            suite = {"machine": {}, "parts": {}}
        suite["machine"] = about()
        if not options.quick:
            print(
                f"{len(parts)} parts, about {sum(p.minutes for p in parts):.0f} minutes on two cores",
                flush=True,
            )
        for part in parts:
            print(
                f"\n{part.name}" + ("" if options.quick else f" (about {part.minutes:g} minutes)"), flush=True
            )
            start = time.perf_counter()
            suite["parts"][part.name] = run(part, quick=options.quick)
            suite["parts"][part.name]["minutes"] = round((time.perf_counter() - start) / 60, 2)
            if skipped := suite["parts"][part.name].get("skipped"):
                print(f"left out: {skipped}", flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(suite, indent=1) + "\n", encoding="utf-8")
    (folder / "suite.md").write_text(summary.table(suite), encoding="utf-8")
    summary.plot(suite, folder / "cost.svg")
    if folder == RESULTS:
        (ROOT / "docs" / "performance.md").write_text(summary.page(suite), encoding="utf-8")
    print(f"\nWritten: {folder}")


if __name__ == "__main__":
    main()
