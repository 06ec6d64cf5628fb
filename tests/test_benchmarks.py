"""The benchmark suite runs, and its table, plot and page say what its results hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as suite_command
from benchmarks import summary
from benchmarks.cost import MAPS, PLAIN, WAYS, exponents

ROOT = Path(__file__).parent.parent


def row(length: int, way: str, ratio: float, peak: float) -> dict[str, Any]:
    numbers = {"cpu_s": ratio, "wall_s": ratio, "ratio": ratio, "low": ratio, "high": ratio, "peak_mb": peak}
    return {"length": length, "way": way, "skipped": None, **numbers}


def suite() -> dict[str, Any]:
    rows = [
        each for n in (512, 1024, 2048) for each in (row(n, PLAIN, 1.0, n / 8), row(n, "fused", 0.97, n / 4))
    ]
    rows.append({"length": 2048, "way": MAPS[0], "skipped": "maps need 9 GiB, 4 GiB are free"})
    machine = {"dtype": "float32", "layers": 12, "threads": 2, "row_pass": "compiled", "torch": "2"}
    return {
        "machine": {
            "cpu": "A processor",
            "cores": 2,
            "memory_gib": 24.0,
            "load_before": 0.1,
            "date": "today",
        },
        "parts": {
            "cost-float32": {"machine": machine, "rows": rows},
            "start": {"rows": [{"command": "sinklens --help", "cpu_s": 0.11, "ratio": 0.07}]},
            "long-context": {"rows": [{"length": 8, "peak_mb": 7.7}], "memory_exponent": {"profile": 1.03}},
            "device": {"skipped": "not run: no CUDA device"},
        },
    }


@pytest.mark.slow
def test_the_smoke_test_of_the_suite(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "cost-bfloat16,device"]
    ran = subprocess.run(
        [*command, "--results", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    parts = json.loads((tmp_path / "suite.json").read_text("utf-8"))["parts"]
    ways = [each["way"] for each in parts["cost-bfloat16"]["rows"]]
    assert ways == [PLAIN, "fused", "fused, pure torch, bf16 scores"] * 2
    assert all(each["ratio"] > 0 for each in parts["cost-bfloat16"]["rows"])
    assert "skipped" in parts["device"] or parts["device"]["rows"]
    assert "bfloat16, 1 layers" in (tmp_path / "suite.md").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the other libraries
def test_the_ways_that_keep_maps_keep_every_map() -> None:
    """Or they would be measured doing less than they are said to do."""
    script = """
import torch
from benchmarks.attention import reference_model
from benchmarks.cost import Bench, MAPS, nnsight_patterns
from benchmarks.profile import batch_of
from sinklens.models.opening import open_model
bench = Bench(open_model(reference_model(torch.float32, 2)))
batch = batch_of(24)
eager = bench.run(MAPS[0], batch)().attentions
cache = bench.run(MAPS[1], batch)()[1]
bridge = [cache[name] for name in cache.keys() if name.endswith("hook_pattern")]
saved = bench.run(MAPS[2], batch)()
for maps in (bridge, saved):
    assert len(maps) == len(eager) == 2
    for one, true in zip(maps, eager):
        torch.testing.assert_close(one, true, atol=1e-5, rtol=0)
print("equal")
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.stdout.endswith("equal\n"), ran.stderr[-3000:]


def test_table_and_page_hold_the_figures() -> None:
    table, page = summary.table(suite()), summary.page(suite())
    for text in (table, page):
        assert "| fused | 0.97 · 2.0× | 0.97 · 2.0× | 0.97 · 2.0× |" in text
        assert "maps need 9 GiB, 4 GiB are free" in text
        assert "fused 1.00" in text  # the exponent: memory grows with the length
        assert "Memory exponent:\n\n| fact | value |\n|---|---|\n| profile | 1.03 |" in text
        assert "device: not run: no CUDA device" in text
    assert "0.11" in table
    assert "0.11" not in page  # seconds of one machine
    assert "0.07" in page


def test_memory_exponents_need_three_lengths() -> None:
    rows = [row(n, "fused", 1.0, (n / 512) ** 2) for n in (512, 1024, 2048)]
    assert exponents(rows)["fused"] == pytest.approx(2.0)
    assert exponents(rows[:2]) == {}


def test_an_empty_suite_is_a_page_too(tmp_path: Path) -> None:
    empty = {"machine": {}, "parts": {}}
    assert summary.page(empty).startswith("# What measuring costs")
    summary.plot(empty, tmp_path / "cost.svg")
    assert not (tmp_path / "cost.svg").exists()
    summary.plot(suite(), tmp_path / "cost.svg")
    assert "<svg" in (tmp_path / "cost.svg").read_text("utf-8")


def test_parts_name_ways_that_exist() -> None:
    for part in suite_command.PARTS:
        for options in (part.options, part.quick or ()):
            if "--ways" in options and part.module == "cost":
                ways = options[options.index("--ways") + 1].split(";")
                assert set(ways) <= set(WAYS), part.name
    with pytest.raises(SystemExit, match="There is no part 'cots'"):
        suite_command.chosen("cots", quick=False)


def test_the_page_is_that_of_the_results() -> None:
    results = json.loads((suite_command.RESULTS / "suite.json").read_text("utf-8"))
    written = (ROOT / "docs" / "performance.md").read_text("utf-8")
    assert written == summary.page(results), "run: python -m benchmarks --write"
