"""What `sinklens mitigate` returns: the run of the unchanged model, and what each mitigation made of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sinklens.core.counts import counted
from sinklens.core.errors import DataError
from sinklens.core.figures import Estimate, Figure, Heatmap, Intervals
from sinklens.mitigations.recipes import Recipe, load_recipe
from sinklens.tracers import signals as sig
from sinklens.tracers.store import RunStore
from sinklens.tracers.trace import Trace

from .mass_ledger import Ledger, ledger_figures, ledger_of
from .run import Run, load_run, stored_manifest
from .tables import Rows
from .verdict import Line, Verdict

if TYPE_CHECKING:
    pass

SECTION = "mitigations"
END = 15
"""Characters that a drawing keeps of each end of a long label."""
REQUEST, RECIPE = "mitigate.json", "recipe.json"
UNITS = {
    "baseline": "the metric's own",
    "delta": "mitigated minus baseline, 95 % interval",
    "p_value": "two-sided, of no change",
    "p_holm": "corrected for all verdicts of the run",
    "n": "items",
    "changed": "items whose result differs",
    "kl_mean": "KL(unchanged || mitigated) in nats, mean over the evaluated next-token positions",
    "kl_positions": "evaluated next-token positions",
    "detectable": "smallest change seen with 80 % power",
}


class Evaluation(Rows):
    """The paired table: one row per mitigation, task and metric; the effect's parts become columns."""

    units = UNITS

    def _flat(self, row: dict[str, Any]) -> dict[str, Any]:
        return {**{k: v for k, v in row.items() if k != "effect"}, **(row.get("effect") or {})}


@dataclass(repr=False)
class MitigationRun(Run):
    """A run whose findings are those of the unchanged model.

    Attributes:
        rows: Of the paired table.
        entries: One per mitigation: what was put on, what it did, what it costs, its verdict, its findings.
        after: The runs under each mitigation, by label.
        recipe: The recommended one; None if no mitigation was helpful.
        recipes: Of every mitigation that acted, by label.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    after: dict[str, Run] = field(default_factory=dict)
    recipe: Recipe | None = None
    recipes: dict[str, Recipe] = field(default_factory=dict)

    @property
    def evaluation(self) -> Evaluation:
        return Evaluation(self.rows)

    @property
    def ledger(self) -> Ledger:
        """What groups of keys get without and with each mitigation."""
        return ledger_of(self.entries)

    @property
    def verdict(self) -> Verdict:
        found = super().verdict
        if found.status == "untrusted":
            return found
        lines = tuple(Line(SECTION, entry["label"], entry["verdict"]["text"]) for entry in self.entries)
        return replace(found, lines=(*lines, *found.lines))

    @property
    def document(self) -> Any:
        from sinklens.core.canonical import plain

        document = super().document
        document["mitigations"] = plain(self.entries)
        document["evaluation"] = plain(self.rows)
        document["recommended"] = plain(self.recommendation)
        return document

    @property
    def recommendation(self) -> dict[str, Any]:
        """Which mitigation to use, or why none."""
        chosen = next((e for e in self.entries if e.get("recommended")), None)
        if chosen is not None:
            return {"label": chosen["label"], "text": f"{chosen['label']} is recommended: it was helpful."}
        judgements = {entry["verdict"]["judgement"] for entry in self.entries}
        said = {
            frozenset({"did not act"}): "None is recommended: no mitigation acted.",
            frozenset({"harmful"}): "None is recommended: every mitigation was harmful.",
        }.get(frozenset(judgements), "None is recommended: no mitigation was helpful without harm.")
        return {"label": None, "text": said}

    @property
    def figures(self) -> dict[str, list[Figure]]:
        return {**super().figures, SECTION: mitigation_figures(self)}

    def __repr__(self) -> str:
        told = [f"{entry['label']}: {entry['verdict']['text']}" for entry in self.entries]
        return "\n".join([super().__repr__(), *told, self.recommendation["text"]])

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Save everything as a run folder that `sinklens.load` reads."""
        from .run import write_run

        store = RunStore(folder)
        store.create(force=force)
        write_run(self, store)
        for label, run in self.after.items():
            run.save(store.folder / "after" / slug(label), force=True)
        write_results(self, store)
        return store.folder


def slug(label: str) -> str:
    """A label as a file name."""
    return re.sub(r"[^\w.-]+", "-", label).strip("-")[:80] or "mitigation"


def write_results(run: MitigationRun, store: RunStore) -> None:
    """The parts of a run folder that belong to mitigations: table, recipes, document and report."""
    import json

    run.folder = store.folder
    if run.rows:
        (store.folder / "tables").mkdir(exist_ok=True)
        run.evaluation.to_frame().to_parquet(store.folder / "tables" / "evaluation.parquet")
    if len(run.ledger):
        run.ledger.to_frame().to_parquet(store.folder / "tables" / "ledger.parquet")
    for label, recipe in run.recipes.items():
        (store.folder / "recipes").mkdir(exist_ok=True)
        recipe.save(store.folder / "recipes" / f"{slug(label)}.json")
    if run.recipe is not None:
        run.recipe.save(store.folder / RECIPE)
    else:
        (store.folder / RECIPE).unlink(missing_ok=True)
    store.write_manifest(stored_manifest(run.trace, run.analyzers, run.checks))
    store.write_text("summary.json", json.dumps(run.document, indent=1, ensure_ascii=False) + "\n")
    run.report()


def is_mitigation_folder(folder: Path) -> bool:
    return (folder / REQUEST).is_file()


def load_mitigation_run(path: str | Path) -> MitigationRun:
    """Read a folder that `sinklens mitigate` wrote.

    Raises:
        DataError: A part is missing or damaged.
    """
    folder = Path(path)
    base = load_run(folder)
    document = _document(folder)
    entries = document["mitigations"]
    after = {}
    for entry in entries:
        place = folder / "after" / slug(entry["label"])
        if (place / "manifest.json").is_file():
            after[entry["label"]] = load_run(place)
        elif entry.get("acted"):
            raise DataError(
                f"{folder} is the run of a mitigation, but its part {place.relative_to(folder)} is missing.",
                detail=f"{entry['label']} acted, so there was a profile under it.",
                hint="Copy the whole folder, or run it again with --force.",
            )
    recipes = {
        entry["label"]: load_recipe(found)
        for entry in entries
        if (found := folder / "recipes" / f"{slug(entry['label'])}.json").is_file()
    }
    recipe = load_recipe(folder / RECIPE) if (folder / RECIPE).is_file() else None
    return MitigationRun(
        base.trace,
        base.analyzers,
        base.checks,
        base.folder,
        base.findings,
        rows=document.get("evaluation") or [],
        entries=entries,
        after=after,
        recipe=recipe,
        recipes=recipes,
    )


def _document(folder: Path) -> dict[str, Any]:
    """The results, without which a mitigation run is not read as if it were a plain one."""
    import json

    place = folder / "summary.json"
    if not place.is_file():
        raise DataError(
            f"{folder} is the run of a mitigation, but its summary.json is missing.",
            detail="It holds the results; either the run was interrupted, or the file was not copied.",
            hint=f"Finish it with: sinklens mitigate --resume {folder}",
        )
    try:
        document = json.loads(place.read_text(encoding="utf-8"))
        labels = [entry["label"] for entry in document["mitigations"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise DataError(
            f"{place} is damaged: {reason}.", hint="Copy the whole folder, or run it again with --force."
        ) from error
    return {**document, "mitigations": document["mitigations"] if labels else []}


def mitigation_figures(run: MitigationRun) -> list[Figure]:
    """Changes with their intervals, attention by group of keys and to the sink, unchanged and under each mitigation."""
    return [*_intervals(run.rows, run.entries), *ledger_figures(run.entries, slug), *_maps(run)]


def _intervals(rows: Sequence[Mapping[str, Any]], entries: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """One drawing per task and metric that a verdict rests on; controls follow their mitigation."""
    figures: list[Figure] = []
    keys = dict.fromkeys((row["task"], row["metric"]) for row in rows if row["role"] != "other")
    for task, metric in keys:
        mine = [row for row in rows if (row["task"], row["metric"]) == (task, metric)]
        estimates: list[Estimate] = []
        for row in mine:
            ends = _number(row["ci_low"]), _number(row["ci_high"])
            named = _both_ends(row["mitigation"])
            estimates.append(Estimate(named, row["delta"], *ends, note=row["verdict"] or ""))
            entry = next((one for one in entries if one["label"] == row["mitigation"]), {})
            estimates += _control_estimates(entry, task, metric)
        better = "more is better" if mine[0]["better"] > 0 else "less is better"
        figures.append(
            Intervals(
                f"change-{task}-{metric}",
                f"{task}: change of {metric.replace('_', ' ')}",
                f"Mitigated minus unchanged on the same {counted(mine[0]['n'], 'item')}; {better}.",
                tuple(estimates),
                f"change of {metric.replace('_', ' ')}",
                interval="95 % interval over items",
            )
        )
    return figures


def _both_ends(label: str) -> str:
    """A long label without its middle: methods differ at their ends."""
    return label if len(label) <= 2 * END else f"{label[: END - 1]}…{label[-END:]}"


def _control_estimates(entry: Mapping[str, Any], task: str, metric: str) -> list[Estimate]:
    found = []
    for control in entry.get("controls") or []:
        for one in control["metrics"]:
            if (one["task"], one["metric"]) == (task, metric):
                change = one["change"]
                ends = _number(change["ci_low"]), _number(change["ci_high"])
                note = f"mean of {control['acted']} draws" if control["acted"] > 1 else "one draw"
                found.append(Estimate(f"{control['kind']} control", change["delta"], *ends, note=note))
    return found


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _maps(run: MitigationRun) -> list[Figure]:
    position = sink_position(run)
    before = sink_map(run.trace, position)
    if before is None or not run.after:
        return []
    found: dict[str, np.ndarray | None] = {}
    for label, other in run.after.items():
        found[label] = sink_map(other.trace, position)
        entry = next((one for one in run.entries if one["label"] == label), {})
        for control in entry.get("controls") or []:
            drawn = (control["sink"] or {}).get("map")
            found[f"{control['kind']} control of {label}"] = None if drawn is None else np.array(drawn)
    known = [before, *(values for values in found.values() if values is not None)]
    top = max(float(np.nanmax(values)) for values in known)
    caption = (
        f"Attention that position {position} receives from the queries that see it, mean over prompts; the same "
        "colours for all of these maps."
    )
    maps = {"unchanged": before, **{k: v for k, v in found.items() if v is not None}}
    return [
        Heatmap(
            f"sink-map-{slug(name)}",
            f"Attention to position {position}: {name}",
            caption,
            values,
            "share",
            limits=(0.0, top),
        )
        for name, values in maps.items()
    ]


def sink_position(run: Run) -> int:
    """The strongest sink of the unchanged model, or, without one, the most attended of the first positions."""
    finding = run.findings.get("primary-sinks")
    if finding is not None and finding.rows:
        return int(finding.rows[0]["position"])
    if not len(run.trace) or sig.ATTENTION_RECEIVED_MEAN not in run.trace.signals:
        return 0
    width = min(16, run.trace.shortest)
    means = [np.nanmean(record[sig.ATTENTION_RECEIVED_MEAN][:, :width], 0) for record in run.trace]
    return int(np.nanargmax(np.mean(means, 0)))


def sink_map(trace: Trace, position: int) -> np.ndarray | None:
    """`[layer, head]`: attention received by a position, mean over the prompts that kept it; None if none did."""
    found = []
    for record in trace:
        if sig.ATTENTION_RECEIVED.name not in record.arrays:
            return None
        at = np.flatnonzero(record[sig.KEPT_POSITIONS] == position)
        if len(at):
            found.append(record[sig.ATTENTION_RECEIVED][:, :, at[0]])
    return np.mean(found, 0) if found else None
