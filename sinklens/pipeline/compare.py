"""Several runs side by side: checkpoints of one training, revisions, models, precisions.

Every run contributes one row of numbers that mean the same for all, and the manifests say what else differed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sinklens.core.counts import counted
from sinklens.core.errors import UsageError
from sinklens.core.figures import Heatmap, Lines, Series
from sinklens.core.manifest import manifest_diff
from sinklens.tracers import signals as sig

from .run import Run, load_run

if TYPE_CHECKING:
    import pandas as pd

# Column, title, unit, logarithmic axis.
QUANTITIES: tuple[tuple[str, str, str, bool], ...] = (
    ("sink_rate", "Sink rate of the strongest position", "% of heads", False),
    ("share", "Attention to the strongest position", "share", False),
    ("strongest_head", "Attention of the strongest head to it", "share", False),
    ("norm_ratio", "Norm of its hidden state over the median token's, largest layer", "ratio", True),
    ("max_ratio", "Largest |h| over its layer's median", "ratio to median", True),
    ("value_drain", "Smallest value norm of it over the others'", "ratio", True),
    ("super_experts", "Super Experts", "count", False),
)

MOST_MAPS = 12
"""Maps of differences on one page, those of the first runs and analyzers."""


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        names: One per run, in the order of the axis.
        x: Training steps if every name ends in a number, else 0, 1, 2, ...
        rows: One per run: `run, x, verdict` and the quantities; None where a quantity does not apply.
        summaries: One row per number that the findings of at least two runs have: `finding, quantity, label`, a value
            per run, and `differs`.
        differences: What differs between the first run and each other one: model, analyzer parameters, manifest.
        figures: One per quantity that at least two runs have.
        maps: Maps of the other runs minus that of the first, by relative depth.
        unmapped: Maps that two runs have and that cannot be subtracted, each with the reason.
    """

    names: tuple[str, ...]
    x_label: str
    x: tuple[float, ...]
    rows: list[dict[str, Any]]
    summaries: list[dict[str, Any]]
    differences: dict[str, Any]
    figures: list[Lines]
    maps: list[Heatmap]
    unmapped: list[str] = field(default_factory=list)

    def to_frame(self) -> pd.DataFrame:
        """The rows as a table; units are in `.attrs["units"]`."""
        import pandas as pd

        frame = pd.DataFrame(self.rows)
        frame.attrs["units"] = {name: unit for name, _, unit, _ in QUANTITIES}
        return frame

    def to_json(self, *, include_text: bool = True) -> dict[str, Any]:
        """The `sinklens/compare/1` document; without text, tokens are left out of the differences."""
        return {
            "schema": "sinklens/compare/1",
            "x_label": self.x_label,
            "rows": self.rows,
            "summaries": self.summaries,
            "unmapped": self.unmapped,
            "differences": self.differences if include_text else without_text(self.differences),
        }

    def report(self, path: str | Path, *, include_text: bool = True) -> Path:
        """One HTML file, like a run's report."""
        from sinklens.report import write_comparison

        return write_comparison(
            Path(path), self.to_json(include_text=include_text), [*self.figures, *self.maps]
        )


def compare(*runs: Run | str | Path) -> Comparison:
    """Set runs side by side.

    Args:
        runs: Runs, or run folders. Folders named by step (`step-500`, `checkpoint-1000`, ...) are drawn over steps.

    Raises:
        UsageError: Fewer than two runs.
        DataError: A folder that is not a run.
    """
    if len(runs) < 2:
        raise UsageError("A comparison needs at least two runs.", hint="sinklens compare RUN RUN [RUN ...]")
    loaded = [run if isinstance(run, Run) else load_run(run) for run in runs]
    names = _names(runs, loaded)
    steps = [_step(name) for name in names]
    if all(step is not None for step in steps) and len(set(steps)) == len(steps):
        order = sorted(range(len(names)), key=lambda i: float(steps[i] or 0))
        x_label, x = "training step", [float(steps[i] or 0) for i in order]
    else:
        order, x_label, x = list(range(len(names))), "run", [float(i) for i in range(len(names))]
    ordered, called = [loaded[i] for i in order], tuple(names[i] for i in order)
    rows = [
        {"run": name, "x": at, **quantities(run)} for name, at, run in zip(called, x, ordered, strict=True)
    ]
    shared = set.intersection(*(set(run.findings) for run in ordered))
    first = comparable(ordered[0], shared)
    differences = {
        name: manifest_diff(first, comparable(run, shared))
        for name, run in zip(called[1:], ordered[1:], strict=True)
    }
    maps, unmapped = difference_maps(called, ordered) if x_label == "run" else ([], [])
    return Comparison(
        called,
        x_label,
        tuple(x),
        rows,
        summaries(called, ordered),
        differences,
        figures(rows, x_label),
        maps,
        unmapped,
    )


def comparable(run: Run, shared: Collection[str]) -> dict[str, Any]:
    """What a run's numbers depend on: its model, the parameters of the analyzers that all runs have, its manifest."""
    document = run.document
    findings, manifest = document["findings"], dict(document["manifest"])
    experiments = manifest.pop("experiments", {}).get("run", [])
    return {
        "model": document["model"],
        "analyzers run": sorted(findings),
        "analyzers": {name: findings[name]["parameters"] for name in findings if name in shared},
        "experiments run": experiments,
        **manifest,
    }


def without_text(differences: Mapping[str, Any]) -> dict[str, Any]:
    """Differences without the tokens that prompts begin with."""
    return {
        name: {key: pair for key, pair in found.items() if not key.startswith("inputs.first_tokens")}
        for name, found in differences.items()
    }


def quantities(run: Run) -> dict[str, Any]:
    """The numbers of one run that are compared."""
    sinks, massive = run.findings.get("primary-sinks"), run.findings.get("massive-activations")
    experts = run.findings.get("super-experts")
    found: dict[str, Any] = {"verdict": run.verdict.status, "model": run.trace.info.id}
    summary = sinks.summary if sinks else {}
    position = summary.get("strongest_position")
    found |= {name: summary.get(name) for name in ("strongest_position", "sink_rate", "share", "value_drain")}
    found["strongest_head"] = strongest_head(run, position) if position is not None else None
    found["norm_ratio"] = norm_ratio(run, position) if position is not None else None
    found["max_ratio"] = massive.summary.get("max_ratio") if massive else None
    found["massive_dims"] = massive.summary.get("dims") if massive else None
    applies = experts is not None and experts.reason is None
    found["super_experts"] = len(experts.rows) if experts is not None and applies else None
    return found


def strongest_head(run: Run, position: int) -> float | None:
    """Mean attention to the position by the head that gives it most."""
    columns = []
    for record in run.trace:
        at = np.flatnonzero(record[sig.KEPT_POSITIONS] == position)
        if len(at):
            columns.append(record[sig.ATTENTION_RECEIVED][:, :, at[0]])
    return float(np.nanmax(np.mean(columns, axis=0))) if columns else None


def norm_ratio(run: Run, position: int) -> float | None:
    """Largest over layers of the position's norm over the median token's, mean over prompts."""
    holders = [
        r[sig.RESIDUAL_NORM] for r in run.trace if len(r) > position and sig.RESIDUAL_NORM.name in r.arrays
    ]
    if not holders:
        return None
    return float(np.max(np.mean([norm[:, position] / np.median(norm, axis=1) for norm in holders], axis=0)))


def figures(rows: Sequence[dict[str, Any]], x_label: str) -> list[Lines]:
    """One curve per quantity that at least two runs have."""
    drawn = []
    for name, title, unit, log in QUANTITIES:
        values = [row[name] for row in rows]
        if sum(value is not None for value in values) < 2:
            continue
        y = np.array([np.nan if value is None else float(value) for value in values])
        x = np.array([row["x"] for row in rows])
        series = (Series(name.replace("_", " "), x, y, emphasis=True),)
        caption = f"{title}, one point per run{'' if x_label == 'run' else f', by {x_label}'}."
        drawn.append(
            Lines(
                name, title, caption, series, x_label, unit, log_y=log and bool((y[~np.isnan(y)] > 0).all())
            )
        )
    return drawn


def summaries(names: Sequence[str], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every single number in the summaries of findings that at least two runs have."""
    table = []
    named = [(name, key) for run in runs for name, f in run.findings.items() for key in f.summary]
    for finding, key in dict.fromkeys(named):
        found = [run.findings.get(finding) for run in runs]
        values = [_number(item.summary.get(key)) if item is not None else None for item in found]
        if sum(value is not None for value in values) < 2:
            continue
        labels = next(item.labels for item in found if item is not None)
        table.append(
            {
                "finding": finding,
                "quantity": key,
                "label": labels.get(key, key.replace("_", " ")),
                "values": dict(zip(names, values, strict=True)),
                "differs": len(set(values)) > 1,
            }
        )
    return table


def _number(value: Any) -> float | int | None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    return value.item() if isinstance(value, np.generic) else value


def difference_maps(names: Sequence[str], runs: Sequence[Run]) -> tuple[list[Heatmap], list[str]]:
    """Maps by layer of each other run minus the first, and the maps that cannot be subtracted, with the reason.

    Models of different depth are set side by side by relative depth: layer i of n stands at i / (n - 1), and the
    deeper one is read at the places of the shallower one, linearly in between. Positions that only one of two runs has
    stay without a value; heads and experts of models with different numbers of them have no counterparts at all.
    """
    drawn: list[Heatmap] = []
    left: list[str] = []
    first = {(name, f.key): f for name, figures in runs[0].figures.items() for f in figures}
    for i, (called, run) in enumerate(zip(names[1:], runs[1:], strict=True), start=1):
        for name, found in run.figures.items():
            for figure in found:
                base = first.get((name, figure.key))
                if not isinstance(figure, Heatmap) or not isinstance(base, Heatmap):
                    continue
                why = _not_comparable(base, figure)
                if why:
                    left.append(f"{base.title}, {called} minus {names[0]}: {why}")
                drawn += _difference(base, figure, names[0], called, f"{name}-{figure.key}-{i}")
    if len(drawn) > MOST_MAPS:
        left.append(
            f"{counted(len(drawn) - MOST_MAPS, 'further map')}: only the first {MOST_MAPS} are drawn."
        )
    return drawn[:MOST_MAPS], left


def _not_comparable(base: Heatmap, other: Heatmap) -> str:
    """Why two maps of one kind cannot be subtracted; empty if they can."""
    wide, other_wide = base.values.shape[-1], other.values.shape[-1]
    if "layer" not in base.y_label:
        return f"its rows are not layers but {base.y_label}."
    if base.unit != other.unit:
        return f"one is in {base.unit}, the other in {other.unit}."
    if not len(base.values) or not len(other.values):
        return "one of them has no layer."
    if wide != other_wide and base.x_label != "position":
        return f"along {base.x_label} one has {wide} columns, the other {other_wide}, without counterparts."
    return "its values span orders of magnitude." if base.log else ""


def _difference(base: Heatmap, other: Heatmap, first: str, name: str, key: str) -> list[Heatmap]:
    if _not_comparable(base, other):
        return []
    depth = min(len(base.values), len(other.values))
    width = max(base.values.shape[1], other.values.shape[1])
    minuend, subtrahend = (_widened(at_depth(figure.values, depth), width) for figure in (other, base))
    apart = minuend - subtrahend
    largest = float(np.nanmax(np.abs(apart))) if np.isfinite(apart).any() else 0.0
    deeper = len(base.values) != len(other.values)
    caption = re.sub(r"\s*Rings: .*?\.(?=\s|$)", "", other.caption)  # a difference has none
    how = (
        f" Layers by relative depth, {len(base.values)} of {first} against {len(other.values)} of {name}."
        if deeper
        else ""
    )
    title = f"{base.title}: {name} minus {first}"
    if (
        other.title != base.title
    ):  # the runs measured it of different things, for instance at different positions
        title = f"{other.title} ({name}) minus {base.title} ({first})"
        how += f" The caption is that of {name}."
    return [
        replace(
            other,
            key=key,
            title=title,
            caption=f"{caption}{how}",
            values=apart,
            unit=base.unit if base.unit.startswith("difference") else f"difference, {base.unit}",
            y_label="layer by relative depth" if deeper else base.y_label,
            marks=(),
            limits=(-largest, largest) if largest else None,
        )
    ]


def _widened(values: np.ndarray, width: int) -> np.ndarray:
    """A map with columns without values up to this width."""
    return np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=np.nan)


def at_depth(values: np.ndarray, depth: int) -> np.ndarray:
    """A map `[layer, x]` read at `depth` evenly spaced relative depths; a layer without a value spreads to its side."""
    values = values.astype(np.float64)
    if len(values) == depth:
        return values
    last, steps = len(values) - 1, max(1, depth - 1)
    low, over = np.divmod(np.arange(depth) * last, steps)  # whole numbers: places that coincide do so exactly
    high, part = np.minimum(low + 1, last), (over / steps)[:, None]
    above = np.where(part > 0, values[high], 0.0)
    return values[low] * (1 - part) + above * part


def _names(runs: Iterable[Run | str | Path], loaded: Sequence[Run]) -> list[str]:
    names = []
    for given, run in zip(runs, loaded, strict=True):
        folder = Path(given) if not isinstance(given, Run) else run.folder
        names.append(folder.name if folder is not None else run.trace.info.id)
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]


def _step(name: str) -> int | None:
    match = re.search(r"(?:step|checkpoint|iter|global_step)[-_]?(\d+)", name)
    return int(match[1]) if match else None
