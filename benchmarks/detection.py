"""How well `sinklens profile` finds planted sinks: recall against strength, false positives against noise.

    python benchmarks/detection.py [--families llama,qwen3_moe] [--seeds 3] [--out detection.json]

Every model is a tiny random one with three planted heads, one massive dim and, in an MoE family, one Super Expert.
The places differ by seed. The analyzers see only the saved folder; the answer key is `truth.json` beside it.
Recall: share of planted things that are reported. False positives: reported heads, dims, experts or positions that
were not planted, and, for the controls, sinks reported in a random or uniform model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sinklens
from sinklens.testbeds import plant_testbed
from sinklens.testbeds.api import MOE_FAMILIES, planted_config
from sinklens.testbeds.controls import random_control, uniform_control
from sinklens.testbeds.measure import read
from sinklens.testbeds.planting.truth import Truth
from sinklens.testbeds.recipe import Recipe
from sinklens.testbeds.train import held_out, save_checkpoint

STRENGTHS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 40.0)
NOISES = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)


@dataclass(frozen=True)
class Row:
    """One profile of one model.

    Attributes:
        strength, noise: In nats; what was planted. None in a control.
        true_share: Largest attention a planted head really gives the target, measured with eager attention.
        sink: The planted position is reported as a primary sink.
        false_positions: Reported positions that were not planted.
        dim: The planted massive dim is reported at the planted block; `false_dims` are others.
        expert: The planted Super Expert is reported (None without experts); `false_experts` are others.
    """

    family: str
    kind: str
    seed: int
    strength: float | None
    noise: float | None
    true_share: float
    sink: bool
    false_positions: int
    dim: bool | None
    false_dims: int
    expert: bool | None
    false_experts: int


def found(run: Any, analyzer: str) -> list[dict[str, Any]]:
    """Rows of a finding; none if it was not found or does not apply."""
    finding = run.findings[analyzer]
    return list(finding.rows) if str(finding.status) == "found" else []


def judge(run: Any, truth: Truth | None) -> dict[str, Any]:
    """Compares what was reported with what was planted."""
    positions = {int(row["position"]) for row in found(run, "primary-sinks")}
    massive = {(int(row["layer"]), int(row["dim"])) for row in found(run, "massive-activations")}
    dims = {dim for _, dim in massive}
    experts = {(int(row["layer"]), int(row["expert"])) for row in found(run, "super-experts")}
    if truth is None:
        return {
            "sink": bool(positions),
            "false_positions": len(positions),
            "dim": None,
            "false_dims": len(dims),
            "expert": None,
            "false_experts": len(experts),
        }
    planted = set(truth.super_experts)
    return {
        "sink": 0 in positions,
        "false_positions": len(positions - {0}),
        "dim": all((item.layer_in, item.dim) in massive for item in truth.massive),
        "false_dims": len(dims - truth.dims),
        "expert": planted <= experts if planted else None,
        "false_experts": len(experts - planted),
    }


def planted_row(family: str, seed: int, strength: float, noise: float | None, kind: str) -> Row:
    """Plants, saves, profiles and judges one model."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        truth = plant_testbed(family, folder, seed=seed, strength=strength, noise=noise)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        received = read(model, held_out(Recipe("", family, {}), 16)).received().mean(1)
        share = max(float(received[layer, head]) for layer, head in truth.head_set)
        return Row(family, kind, seed, strength, noise, share, **judge(sinklens.profile(str(folder)), truth))


def control_row(family: str, seed: int, kind: str) -> Row:
    """Profiles a model in which nothing was planted."""
    build = {"random": random_control, "uniform": uniform_control}[kind]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build(planted_config(family), seed)
        save_checkpoint(model, Recipe("", family, {}), folder)
        share = float(read(model, held_out(Recipe("", family, {}), 16)).received().mean(1).max())
        return Row(family, kind, seed, None, None, share, **judge(sinklens.profile(str(folder)), None))


def measure(families: list[str], seeds: int) -> list[Row]:
    """Every row of the benchmark."""
    rows = []
    for family in families:
        for seed in range(seeds):
            for strength in STRENGTHS:
                rows.append(planted_row(family, seed, strength, None, "strength"))
            for noise in NOISES:
                rows.append(planted_row(family, seed, 40.0, noise, "noise"))
            rows += [control_row(family, seed, kind) for kind in ("random", "uniform")]
            print(f"{family} seed {seed}: {len(rows)} profiles so far", flush=True)
    return rows


def table(rows: list[Row]) -> str:
    """Markdown: one line per family, kind and setting, averaged over seeds."""
    lines = [
        "| family | kind | nats | true share | sink found | dim found | expert found | false positions, dims, "
        "experts per model |",
        "|---|---|---|---|---|---|---|---|",
    ]
    keys = list(
        dict.fromkeys((r.family, r.kind, r.strength if r.kind == "strength" else r.noise) for r in rows)
    )
    for family, kind, setting in keys:
        group = [
            r
            for r in rows
            if (r.family, r.kind, r.strength if r.kind == "strength" else r.noise) == (family, kind, setting)
        ]
        mean = {
            name: statistics.mean(values) if values else None
            for name in (
                "true_share",
                "sink",
                "dim",
                "expert",
                "false_positions",
                "false_dims",
                "false_experts",
            )
            for values in [[float(getattr(r, name)) for r in group if getattr(r, name) is not None]]
        }
        cells = ["-" if mean[name] is None else f"{mean[name]:.2f}" for name in ("sink", "dim", "expert")]
        wrong = ", ".join(f"{mean[name]:.2f}" for name in ("false_positions", "false_dims", "false_experts"))
        label = "-" if setting is None else f"{setting:g}"
        lines.append(
            f"| {family} | {kind} | {label} | {mean['true_share']:.2f} | {' | '.join(cells)} | {wrong} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Detection of planted sinks by sinklens profile.")
    parser.add_argument("--families", default="llama,qwen3_moe")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="all rows as JSON")
    args = parser.parse_args()
    families = args.families.split(",")
    rows = measure(families, args.seeds)
    assert all((row.expert is not None) == (row.family in MOE_FAMILIES) for row in rows if row.strength)
    if args.out:
        args.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
