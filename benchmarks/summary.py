"""Table, plot and page from the results of the suite (`suite.json`); nothing is measured here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .cost import MAPS, PLAIN, exponents

Suite = Mapping[str, Any]
_LARGE = 10
# Columns of other parts that are times or sizes of one machine: in the table, not on the page.
_ABSOLUTE = ("_s", "_mb", "_gb", "_ms", "_memory", "_read", "_stored", "bytes", "minutes")


def cost_rows(suite: Suite) -> list[dict[str, Any]]:
    """The rows of all parts on cost, with type and number of layers."""
    found = []
    for name, part in suite["parts"].items():
        if name.startswith("cost") and "rows" in part:
            setting = {"dtype": part["machine"]["dtype"], "layers": part["machine"]["layers"]}
            found += [setting | row for row in part["rows"]]
    return found


def settings(rows: Iterable[dict[str, Any]]) -> list[tuple[str, int]]:
    """Type and layers, in the order of the parts."""
    return list(dict.fromkeys((row["dtype"], row["layers"]) for row in rows))


def cost_table(rows: list[dict[str, Any]], dtype: str, layers: int, *, memory: bool) -> str:
    """Ratio of CPU time by way and length, and the memory above the model in multiples of the plain pass."""
    rows = [row for row in rows if (row["dtype"], row["layers"]) == (dtype, layers)]
    lengths = sorted({row["length"] for row in rows})
    floor = {row["length"]: row["peak_mb"] for row in rows if row["way"] == PLAIN}
    lines = ["| way | " + " | ".join(f"T = {length}" for length in lengths) + " |"]
    lines.append("|---" * (len(lengths) + 1) + "|")
    for way in dict.fromkeys(row["way"] for row in rows):
        at = {row["length"]: row for row in rows if row["way"] == way}
        lines.append(
            f"| {way} | " + " | ".join(_cell(at.get(n), floor.get(n), memory) for n in lengths) + " |"
        )
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None, floor: float | None, memory: bool) -> str:
    if row is None:
        return "–"
    if row.get("skipped"):
        return row["skipped"]
    if not memory:
        return f"{row['ratio']:.2f}"
    held = f"{row['peak_mb'] / floor:.1f}×" if floor and floor > 0 else "?"
    return f"{row['ratio']:.2f} · {held}"


def memory_sentence(rows: list[dict[str, Any]]) -> str:
    """How peak memory grows with the length, for the ways with three lengths or more."""
    one = [row for row in rows if (row["dtype"], row["layers"]) == ("float32", 12)]
    found = exponents(one)
    lengths = sorted({row["length"] for row in one})
    if not found:
        return "Too few lengths for an exponent of memory."
    said = ", ".join(f"{way} {slope:.2f}" for way, slope in found.items())
    return f"Peak memory above the model grows with T to the power of (fit from T = {lengths[0]} on): {said}."


def generic_table(rows: list[dict[str, Any]], *, absolute: bool) -> str:
    """Rows of any part: every number and short word; times and sizes only if `absolute`."""
    plain = [
        {k: v for k, v in row.items() if isinstance(v, (int, float, str)) and len(str(v)) < 60}
        for row in rows
    ]
    names = [
        name
        for name in dict.fromkeys(key for row in plain for key in row)
        if absolute or not name.endswith(_ABSOLUTE)
    ]
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * len(names) + "|"]
    lines += ["| " + " | ".join(_number(row.get(name, "–")) for name in names) + " |" for row in plain]
    return "\n".join(lines)


def has_ratios(rows: list[dict[str, Any]]) -> bool:
    """Whether the rows hold figures that are no absolute ones."""
    return any(
        isinstance(value, float) and not name.endswith(_ABSOLUTE)
        for row in rows
        for name, value in row.items()
    )


def _digests(part: dict[str, Any], *, absolute: bool) -> list[str]:
    """What a part says of all its rows: exponents of memory over the length, ratios."""
    found = []
    for name in ("memory_exponent", "summary"):
        if isinstance(said := part.get(name), dict) and said:
            found += [f"{name.replace('_', ' ').capitalize()}:", facts_table(said, absolute=absolute)]
    return found


def facts_table(said: dict[str, Any], *, absolute: bool) -> str:
    """One fact per line; those of a group are named after it."""
    lines = ["| fact | value |", "|---|---|"]
    for name, value in said.items():
        if absolute or not name.endswith(_ABSOLUTE):
            facts = value.items() if isinstance(value, dict) else [("", value)]
            lines += [
                f"| {' · '.join(filter(None, (name.replace('_', ' '), key)))} | {_number(x)} |"
                for key, x in facts
            ]
    return "\n".join(lines)


def _number(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2f}" if abs(value) < _LARGE else f"{value:.0f}"


def _others(suite: Suite) -> dict[str, dict[str, Any]]:
    return {name: part for name, part in suite["parts"].items() if not name.startswith("cost")}


def left_out(suite: Suite) -> list[str]:
    """Parts without a result, with the reason."""
    return [f"{name}: {part['skipped']}" for name, part in suite["parts"].items() if part.get("skipped")]


def machine_sentence(suite: Suite) -> str:
    parts = [part["machine"] for part in suite["parts"].values() if "threads" in part.get("machine", {})]
    about, first = suite["machine"], parts[0] if parts else {}
    said = [str(about.get("cpu")), f"{about.get('cores')} cores, {about.get('memory_gib')} GiB"]
    if first:
        said += [f"{first['threads']} threads", f"{first.get('row_pass')} row pass"]
        said += [f"{name} {first[name]}" for name in ("torch", "transformers") if name in first]
    return f"{', '.join(said)}, {about.get('date')}; load average before: {about.get('load_before')}."


def table(suite: Suite) -> str:
    """Everything that was measured, absolute figures included."""
    rows = cost_rows(suite)
    text = ["# Results", machine_sentence(suite)]
    for dtype, layers in settings(rows):
        text += [f"## {dtype}, {layers} layers: CPU time · memory, against {PLAIN}"]
        text += [cost_table(rows, dtype, layers, memory=True)]
    if rows:
        text += [memory_sentence(rows), "## Every pass", generic_table(rows, absolute=True)]
    for name, part in _others(suite).items():
        if "rows" in part:
            text += [f"## {name}", generic_table(part["rows"], absolute=True), *_digests(part, absolute=True)]
        if "report" in part:
            text += [generic_table([part["report"]], absolute=True)]
    text += [f"Left out: {line}" for line in left_out(suite)]
    return "\n\n".join(text) + "\n"


def page(suite: Suite) -> str:
    """`docs/performance.md`: ratios of one run."""
    rows = cost_rows(suite)
    text = [
        "# What measuring costs",
        "Written from the results in `benchmarks/results/suite.json` (`make bench`). Every figure is a ratio "
        "measured in one run, against a plain forward pass with SDPA, or is a slope. Absolute figures are in "
        "`benchmarks/results/suite.md`; they are of one machine.",
        machine_sentence(suite),
        "The reference model is a Llama of width 768 with 12 heads (4 key heads) of width 64, inner width 2048, "
        "vocabulary 8192, with random weights; batch 1, no cache. `fused` computes output and statistics in one pass, "
        "`faithful` (the default) leaves the output to the model's own kernel, bit for bit, and computes the "
        "statistics beside it. Both record what the default analyzers read; `all signals` is what all of them read. "
        "`pure torch` does without the compiled kernels. The last three ways keep the attention maps that a notebook "
        "would compute its own statistics from. A cell holds CPU time (all threads) and peak memory above the loaded "
        f"model, both over those of {PLAIN}.",
    ]
    if rows:
        text += ["![CPU time and peak memory over the length](../benchmarks/results/cost.svg)"]
    for dtype, layers in settings(rows):
        text += [f"## {dtype}, {layers} layers", cost_table(rows, dtype, layers, memory=True)]
        if dtype == "bfloat16":
            text += [
                "Statistics are computed from float32 logits, except where a way says `bf16 scores`: there logits are "
                "rounded to bfloat16, as an eager bfloat16 model rounds them, and shares are right to about one "
                "percent."
            ]
    text += [memory_sentence(rows) if rows else "The cost of a pass is not among the results: `make bench`."]
    for name, part in _others(suite).items():
        if "rows" in part:
            ratios = [generic_table(part["rows"], absolute=False)] if has_ratios(part["rows"]) else []
            text += [f"## {name}", *ratios, *_digests(part, absolute=False)]
        if report := part.get("report"):
            text += [
                f"Writing the report takes {report['report_ratio']:.2f} of the CPU time of a profile of "
                f"{report['prompts']} prompts of the bundled checkpoint; the file has {report['report_mb']:.1f} MB."
            ]
    if lines := left_out(suite):
        text += ["## Not measured", "\n".join(f"- {line}" for line in lines)]
    text += [_SWITCHES]
    return "\n\n".join(text) + "\n"


_SWITCHES = """## Kernels and switches

Which kernel takes the statistics is chosen by itself; `sinklens doctor` and the manifest of a run
(`tracing.statistics`) name it, and say why a faster one is not there.

| device | kernel | needs | without it |
|---|---|---|---|
| CPU | C, built on first use | a C compiler: `CC`, `cc`, `gcc` or `clang` | torch, the same to rounding |
| CUDA | Triton | the package `triton`, which CUDA builds of torch bring along | torch |
| other | torch | | |

- `SINKLENS_NATIVE=0` leaves the compiled kernels out, `SINKLENS_TRITON=0` the Triton kernels.
- `CC` chooses the compiler, `XDG_CACHE_HOME` where the library is kept (`sinklens` below it, else below `~/.cache`).
  Its name holds the source, the flags, the processor and its own content, and it is moved into place when it is whole,
  so several processes may build it at once.
- Before either is used it must reproduce a reference on this machine; one that does not is left out, with a warning.

The Triton kernels are compared with the definition in Triton's interpreter and compiled for two kinds of CUDA device.
`python -m benchmarks.device` measures them against flash attention where there is a device."""


def plot(suite: Suite, file: Path) -> None:
    """CPU time and memory over the length, of the float32 model of 12 layers; no file where nothing was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in cost_rows(suite) if row["dtype"] == "float32" and "ratio" in row]
    if not rows:
        return
    most = max(row["layers"] for row in rows)
    rows = [row for row in rows if row["layers"] == most]
    with pyplot.rc_context({"svg.hashsalt": "sinklens", "font.size": 9}):
        figure, axes = pyplot.subplots(1, 2, figsize=(9.5, 3.8))
        for ax, key, title in zip(
            axes,
            ("ratio", "peak_mb"),
            ("CPU time / plain SDPA", "peak memory above the model, MB"),
            strict=True,
        ):
            for way in dict.fromkeys(row["way"] for row in rows):
                points = sorted(
                    (r["length"], r[key]) for r in rows if r["way"] == way and not math.isnan(r[key])
                )
                style = ":" if way in MAPS else "--" if "torch" in way else "-"
                ax.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=way)
            ax.set(xscale="log", yscale="log", xlabel="length T", title=title)
            lengths = sorted({row["length"] for row in rows})
            ax.set_xticks(lengths, [str(n) for n in lengths], minor=False)
            ax.minorticks_off()
            ax.grid(alpha=0.3)
        axes[0].set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        axes[1].legend(fontsize=7, frameon=False)
        figure.tight_layout()
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)
