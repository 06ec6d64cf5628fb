"""How well `sinklens profile` finds planted sinks: precision and recall, and where they end.

    python -m benchmarks.detection --families all --seeds 10

Every planted model is a tiny random one with three sink heads, one massive dim and, in an MoE family, one Super
Expert; the places differ by seed. The analyzers run at their defaults and see only the model; the answer key is the
`Truth` of the planting. Counts are sums over seeds: right (reported and planted), wrong (reported, not planted) and
missed (planted, not reported). In a control nothing was planted, so whatever is reported is wrong.

`full`: strength 40, every family. `strength` and `noise`: sweeps on the families of `--sweep`. Controls: random
weights, one block, uniform attention.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sinklens.testbeds.planting.truth import Truth

STRENGTHS = (1.0, 2.0, 2.5, 3.0, 3.5, 4.0, 6.0, 8.0, 12.0, 40.0)
NOISES = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)
CONTROLS = ("random", "one-layer", "uniform")
THINGS = ("positions", "heads", "massive", "experts")
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Task:
    """One profile of one model; strength and noise in nats, None in a control."""

    family: str
    kind: str
    seed: int
    strength: float | None = None
    noise: float | None = None
    prompts: int = 8

    @property
    def setting(self) -> float | None:
        return self.noise if self.kind == "noise" else self.strength


def reported(run: Any) -> dict[str, set[Any]]:
    """What the analyzers say: positions, `(layer, head)`, `(layer, dim)`, `(layer, expert)`."""
    sinks, massive, experts = (
        run.findings[name] for name in ("primary-sinks", "massive-activations", "super-experts")
    )
    return {
        "positions": {row["position"] for row in sinks.rows},
        "heads": {(head[0], head[1]) for head in sinks.summary.get("heads", [])},
        "massive": {(row["layer"], row["dim"]) for row in massive.rows},
        "experts": {(row["layer"], row["expert"]) for row in experts.rows},
    }


def planted(truth: Truth | None) -> dict[str, set[Any]]:
    """The answer key in the same form; BOS stands at position 0 of every prompt."""
    if truth is None:
        return {name: set() for name in THINGS}
    massive = {(layer, item.dim) for item in truth.massive for layer in range(item.layer_in, item.layer_out)}
    return {
        "positions": {0},
        "heads": set(truth.head_set),
        "massive": massive,
        "experts": set(truth.super_experts),
    }


def build(task: Task) -> tuple[PreTrainedModel, Truth | None]:
    """The model and its answer key; None for a control."""
    from sinklens.testbeds.api import planted_config, planted_model
    from sinklens.testbeds.controls import one_layer_control, random_control, uniform_control

    if task.strength is not None:
        return planted_model(task.family, seed=task.seed, strength=task.strength, noise=task.noise)
    control = {"random": random_control, "one-layer": one_layer_control, "uniform": uniform_control}
    return control[task.kind](planted_config(task.family), task.seed), None


def measure(task: Task) -> dict[str, Any]:
    """Builds, profiles and judges one model.

    `share` is the mean over the planted heads (a control: the largest of any head) of the attention that BOS
    receives, from eager attention without the tracers, on held-out sequences other than the profiled ones.
    """
    import torch

    import sinklens
    from sinklens.testbeds.measure import read
    from sinklens.testbeds.recipe import Recipe
    from sinklens.testbeds.train import build_tokenizer, held_out, save_checkpoint

    torch.set_num_threads(1)
    model, truth = build(task)
    recipe = Recipe("", task.family, {})
    received = read(model, held_out(recipe, task.prompts)).received().mean(1)
    heads = [] if truth is None else sorted(truth.head_set)
    share = float(received.max() if truth is None else sum(received[at] for at in heads) / len(heads))
    with tempfile.TemporaryDirectory() as name:
        folder = save_checkpoint(model, recipe, Path(name), dtype=torch.float32)
        if (
            task.family == "qwen2"
        ):  # transformers opens such a folder with the Qwen2 tokenizer, whatever it holds
            prompts = str(folder / "sinklens_prompts.jsonl")
            run = sinklens.profile(model, tokenizer=build_tokenizer(recipe), prompts=prompts, n=task.prompts)
        else:
            run = sinklens.profile(str(folder), n=task.prompts)
    said, key = reported(run), planted(truth)
    counts = {
        name: [len(said[name] & key[name]), len(said[name] - key[name]), len(key[name] - said[name])]
        for name in THINGS
    }
    return {"task": task, "share": share, "counts": counts}


def tasks(families: list[str], sweep: list[str], seeds: int, prompts: int) -> Iterator[Task]:
    """Every model of the benchmark."""
    for seed in range(seeds):
        for family in families:
            yield Task(family, "full", seed, 40.0, None, prompts)
            for kind in CONTROLS:
                yield Task(family, kind, seed, None, None, prompts)
        for family in sweep:
            for strength in STRENGTHS:
                yield Task(family, "strength", seed, strength, None, prompts)
            for noise in NOISES:
                yield Task(family, "noise", seed, 40.0, noise, prompts)


def summed(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per family, kind and setting, summed over seeds."""
    groups: dict[tuple[str, str, float | None], list[dict[str, Any]]] = {}
    for result in results:
        task = result["task"]
        groups.setdefault((task.family, task.kind, task.setting), []).append(result)
    lines = []
    for (family, kind, setting), group in groups.items():
        line: dict[str, Any] = {"family": family, "kind": kind, "nats": setting, "models": len(group)}
        line["true_share"] = round(sum(item["share"] for item in group) / len(group), 2)
        for name in THINGS:
            sums = (sum(item["counts"][name][i] for item in group) for i in range(3))
            line[name] = dict(zip(("right", "wrong", "missed"), sums, strict=True))
        lines.append(line)
    return lines


def rate(lines: list[dict[str, Any]], name: str, against: str) -> float | None:
    """Recall (`against="missed"`) or precision (`against="wrong"`); None where there is nothing to divide."""
    right = sum(line[name]["right"] for line in lines)
    other = sum(line[name][against] for line in lines)
    return right / (right + other) if right + other else None


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown; every cell is right / wrong / missed."""
    rows = ["| family | kind | nats | models | true share | " + " | ".join(THINGS) + " |", "|---" * 9 + "|"]
    for line in lines:
        cells = [" / ".join(str(count) for count in line[name].values()) for name in THINGS]
        nats = "-" if line["nats"] is None else f"{line['nats']:g}"
        head = (
            f"| {line['family']} | {line['kind']} | {nats} | {line['models']} | {line['true_share']:.2f} | "
        )
        rows.append(head + " | ".join(cells) + " |")
    return "\n".join(rows)


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Left: strength against recall and true share. Right: noise against false positives per model and true share."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Colours of Okabe and Ito, with markers of their own, so that nothing hangs on colour alone.
    styles = dict(
        zip(THINGS, (("#0072B2", "o"), ("#E69F00", "s"), ("#009E73", "^"), ("#CC79A7", "D")), strict=True)
    )
    figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, kind in zip(figure.subplots(1, 2), ("strength", "noise"), strict=True):
        chosen = [line for line in lines if line["kind"] == kind]
        settings = sorted({line["nats"] for line in chosen})
        groups = [[line for line in chosen if line["nats"] == at] for at in settings]
        for name, (colour, marker) in styles.items():
            if kind == "strength":
                values = [rate(group, name, "missed") for group in groups]
            else:
                models = [sum(line["models"] for line in group) for group in groups]
                wrong = [sum(line[name]["wrong"] for line in group) for group in groups]
                values = [count / of for count, of in zip(wrong, models, strict=True)]
            size = 3 * (
                len(THINGS) - THINGS.index(name)
            )  # equal curves lie on each other: the first is the widest
            axes.plot(settings, values, color=colour, marker=marker, ms=size + 2, lw=size / 2, label=name)
        share = axes.twinx()
        means = [sum(line["true_share"] for line in group) / len(group) for group in groups]
        share.plot(settings, means, color="black", linestyle="--", label="true share (right axis)")
        share.set(ylim=(-0.05, 1.05), ylabel="true share of planted heads")
        axes.set(ylim=(-0.05, 1.05), xlabel=f"{kind} in nats")
        if kind == "strength":
            share.axhline(0.3, color="black", linestyle=":", linewidth=0.8)
            axes.set(xscale="log", ylabel="recall", title="Weaker sinks")
            ticks = [1, 2, 3, 4, 6, 12, 40]
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
        else:
            axes.set(ylabel="false positives per model", title="Noisier other heads (strength 40)")
        handles = [*axes.get_lines(), share.get_lines()[0]]
        axes.legend(handles=handles, fontsize=8, loc="center right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    from sinklens.testbeds.blocks import FAMILIES

    parser = argparse.ArgumentParser(description="Detection of planted sinks by sinklens profile.")
    parser.add_argument("--families", default="all", help="comma-separated, or all")
    parser.add_argument(
        "--sweep", default="llama,qwen3_moe", help="families of the strength and noise sweeps"
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=8, help="prompts per profile, of 64 tokens")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/detection.json")
    parser.add_argument("--image", type=Path, default=ROOT / "docs/images/detection.png")
    args = parser.parse_args()
    families: list[str] = [*FAMILIES] if args.families == "all" else args.families.split(",")
    todo = list(tasks(families, args.sweep.split(","), args.seeds, args.prompts))
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(measure, todo, chunksize=8))
    lines = summed(results)
    text = json.dumps({"seeds": args.seeds, "prompts": args.prompts, "rows": lines}, indent=1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text + "\n", encoding="utf-8")
    draw(lines, args.image)
    print(table(lines))
    full = [line for line in lines if line["kind"] == "full"]
    for name in THINGS:
        print(
            f"full strength, {name}: precision {rate(full, name, 'wrong')}, recall {rate(full, name, 'missed')}"
        )
    controls = [line for line in lines if line["kind"] in CONTROLS]
    wrong = sum(line[name]["wrong"] for line in controls for name in THINGS)
    print(f"controls: {sum(line['models'] for line in controls)} models, {wrong} findings")


if __name__ == "__main__":
    main()
