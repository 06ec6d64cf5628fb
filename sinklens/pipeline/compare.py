"""Several runs side by side: checkpoints of one training, revisions, models, precisions.

Every run contributes one row of numbers that mean the same for all, and the manifests say what else differed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sinklens.core.errors import UsageError
from sinklens.core.figures import Lines, Series
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


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        names: One per run, in the order of the axis.
        x: Training steps if every name ends in a number, else 0, 1, 2, ...
        rows: One per run: `run, x, verdict` and the quantities; None where a quantity does not apply.
        differences: What differs between the manifests of the first run and each other one.
        figures: One per quantity that at least two runs have.
    """

    names: tuple[str, ...]
    x_label: str
    x: tuple[float, ...]
    rows: list[dict[str, Any]]
    differences: dict[str, Any]
    figures: list[Lines]

    def to_frame(self) -> pd.DataFrame:
        """The rows as a table; units are in `.attrs["units"]`."""
        import pandas as pd

        frame = pd.DataFrame(self.rows)
        frame.attrs["units"] = {name: unit for name, _, unit, _ in QUANTITIES}
        return frame

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": "sinklens/compare/1",
            "x_label": self.x_label,
            "rows": self.rows,
            "differences": self.differences,
        }

    def report(self, path: str | Path) -> Path:
        """One HTML file, like a run's report."""
        from sinklens.report import write_comparison

        return write_comparison(Path(path), self.to_json(), self.figures)


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
    rows = [{"run": names[i], "x": at, **quantities(loaded[i])} for i, at in zip(order, x, strict=True)]
    first = loaded[order[0]].document["manifest"]
    differences = {names[i]: manifest_diff(first, loaded[i].document["manifest"]) for i in order[1:]}
    return Comparison(
        tuple(names[i] for i in order), x_label, tuple(x), rows, differences, figures(rows, x_label)
    )


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
        caption = f"{title}, one point per run, by {x_label}."
        drawn.append(
            Lines(
                name, title, caption, series, x_label, unit, log_y=log and bool((y[~np.isnan(y)] > 0).all())
            )
        )
    return drawn


def _names(runs: Iterable[Run | str | Path], loaded: Sequence[Run]) -> list[str]:
    names = []
    for given, run in zip(runs, loaded, strict=True):
        folder = Path(given) if not isinstance(given, Run) else run.folder
        names.append(folder.name if folder is not None else run.trace.info.id)
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]


def _step(name: str) -> int | None:
    match = re.search(r"(?:step|checkpoint|iter|global_step)[-_]?(\d+)", name)
    return int(match[1]) if match else None
