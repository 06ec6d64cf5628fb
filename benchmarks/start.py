"""What starting costs, and what a report costs: the command line, the imports, a first profile, its HTML file.

    python -m benchmarks.start --repeats 3

Each row is a process of its own, and of its repeats the smallest CPU time counts; ratios are to `import torch`. The
report is that of the bundled checkpoint: the time to write it against that of the whole profile, and its size.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .profile import machine

FLOOR = "import torch"
COMMANDS = {
    FLOOR: ("-c", "import torch"),
    "import transformers": ("-c", "import transformers, torch; transformers.LlamaForCausalLM"),
    "sinklens --help": ("-m", "sinklens", "--help"),
    "import sinklens": ("-c", "import sinklens"),
    "sinklens ls analyzers": ("-m", "sinklens", "ls", "analyzers"),
    "sinklens profile --dry-run": ("-m", "sinklens", "profile", "--dry-run"),
}


def measure(repeats: int) -> list[dict[str, Any]]:
    """One row per command: CPU and wall seconds, and the ratio of CPU time to the floor."""
    rows: list[dict[str, Any]] = []
    for name, command in COMMANDS.items():
        runs = [_run(command) for _ in range(repeats)]
        rows.append({"command": name, "cpu_s": min(c for c, _ in runs), "wall_s": min(w for _, w in runs)})
    floor = next(row["cpu_s"] for row in rows if row["command"] == FLOOR)
    return [row | {"ratio": row["cpu_s"] / floor} for row in rows]


def _run(command: tuple[str, ...]) -> tuple[float, float]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True, env=environment)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def measure_report(prompts: int) -> dict[str, Any]:
    """A profile of the bundled checkpoint and its report."""
    import sinklens as sl

    sl.profile(n=1, verify=False)  # what is loaded on first use
    c = time.process_time()
    run = sl.profile(n=prompts, verify=False)
    profile = time.process_time() - c
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.html"
        c = time.process_time()
        run.report(file)
        report = time.process_time() - c
        size = file.stat().st_size
    return {
        "prompts": prompts,
        "profile_cpu_s": profile,
        "report_cpu_s": report,
        "report_ratio": report / profile,
        "report_mb": size / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--out", type=Path, help="append the result to this JSON list")
    options = parser.parse_args()
    rows, report = measure(options.repeats), measure_report(options.prompts)
    for row in rows:
        print(
            f"{row['command']:<28} cpu {row['cpu_s']:6.2f} s   x{row['ratio']:.2f} of import torch",
            flush=True,
        )
    print(f"report: {report['report_mb']:.2f} MB, x{report['report_ratio']:.2f} of the profile's CPU time")
    if options.out is not None:
        result = {"machine": machine(1, "float32"), "rows": rows, "report": report}
        before = json.loads(options.out.read_text("utf-8")) if options.out.exists() else []
        options.out.write_text(json.dumps([*before, result], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
