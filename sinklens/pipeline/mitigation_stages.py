"""The stages of one mitigation: calibrate it, ask the tasks under it, time it, profile the model under it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sinklens.core.counts import counted
from sinklens.evaluation.running import Question
from sinklens.evaluation.splits import CalibrationSplit
from sinklens.evaluation.tasks import Task
from sinklens.mitigations import Method
from sinklens.mitigations.recipes import recipe_for
from sinklens.models.spec import OpenedModel
from sinklens.tracers.executor import trace
from sinklens.tracers.store import RunStore

from .divergence import Divergence, kl_to_unchanged
from .judging import Assignment, Judged, Result, ask_under, overhead
from .listener import Listener
from .mass_ledger import side_by_side
from .mitigate_options import MitigateOptions
from .mitigate_setup import Job, search_of
from .mitigation_controls import judge_controls
from .mitigation_run import slug
from .prepare import Prepared
from .run import Run, write_run
from .scoring import calibrate, put_on
from .sink_change import change_of, sink_of


@dataclass
class Setting:
    """What all mitigations of a run share."""

    opened: OpenedModel
    options: MitigateOptions
    listener: Listener
    given: list[Assignment]
    calibration: CalibrationSplit | None
    calibration_task: Task | None
    prepared: Prepared
    run: Run
    store: RunStore | None
    baseline: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    probes: list[Question] = field(default_factory=list)
    after: dict[str, Run] = field(default_factory=dict)


def judge_job(setting: Setting, job: Job) -> Result:
    """One mitigation from calibration to the profile under it."""
    before = stored_result(setting.store, slug(job.label))
    if before is not None:
        before["judged"] = {name: Judged(**judged) for name, judged in before["judged"].items()}
        return Result(**before)
    opened, listener = setting.opened, setting.listener
    method, result = job.method, Result(job.label, job.method.name, {}, False)
    recipe = job.recipe
    if job.nothing:
        result.said, result.parameters = f"{method.name} did not act: {job.nothing}", method.parameters
        store_result(setting.store, slug(job.label), asdict(result))
        return result
    if job.calibrate:
        found = _calibrated(setting, job)
        told, recipe = found.to_json(), found.recipe
        if job.replaced:
            told["text"] += f" It chooses {', '.join(job.replaced)}; what was given is not used."
        result.calibration = told
        if recipe is None:
            result.kept, result.parameters = found.text, job.method.parameters
            store_result(setting.store, slug(job.label), asdict(result))
            return result
        method = recipe.mitigation
    result.parameters = method.parameters
    for one in setting.given:
        listener.stage(f"Judge {job.label} on {one.task.name}")
        result.judged[one.task.name] = ask_under(opened, method, one, listener.progress)
    outcomes = [judged.outcome for judged in result.judged.values()]
    result.acted = any(outcome["acted"] for outcome in outcomes)
    result.said = next((o["text"] for o in outcomes if o["acted"]), outcomes[0]["text"])
    kl = kl_to_unchanged(opened, method, setting.probes) if result.acted else Divergence(0.0, 0)
    result.effect = {
        "rows_edited": sum(outcome["rows_edited"] for outcome in outcomes),
        "kl_mean": kl.mean,
        "kl_positions": kl.positions,
        "mean_mass_moved": max((o.get("mean_mass_moved", 0.0) for o in outcomes), default=0.0),
    }
    if result.acted:
        result.cost = overhead(opened, method, setting.probes)
        result.findings = _after(setting, job.label, method)
        result.sink = _sink_change(setting, job.label)
        result.controls = judge_controls(setting, job.label, method)
        traces = setting.run.trace, setting.after[job.label].trace
        result.ledger = side_by_side(*traces, setting.run.analyzers)
        recipe = recipe or recipe_for(method, opened)
        result.recipe = recipe.to_json()
    store_result(setting.store, slug(job.label), asdict(result))
    return result


def _calibrated(setting: Setting, job: Job) -> Any:
    assert setting.calibration is not None
    assert setting.calibration_task is not None
    search = search_of(job.method, setting.options)
    passes = search.passes(job.method, setting.opened.anatomy.main)
    tokens = setting.calibration_task.tokens(setting.opened, setting.calibration.items)
    setting.listener.stage(
        f"Calibrate {job.label}: at most {counted(passes, 'pass', 'passes')} over "
        f"{counted(len(setting.calibration), 'item')} ({counted(tokens, 'token')} each)"
    )
    return calibrate(
        setting.opened,
        job.method,
        setting.calibration_task,
        setting.calibration,
        search=search,
        progress=setting.listener.progress,
    )


def _after(setting: Setting, label: str, method: Method) -> dict[str, Any]:
    """The findings while the mitigation is on, and its traces in the folder."""
    setting.listener.stage(f"Profile under {label}")
    plan = replace(setting.prepared.plan, signals=setting.prepared.plan.signals)
    with put_on(method, setting.opened):
        traced = trace(setting.opened, setting.prepared.prompts, plan, progress=setting.listener.progress)
    traced.manifest = {**setting.run.trace.manifest, "status": "complete", "mitigation": label}
    traced.manifest.pop("experiments", None)
    run = Run(traced, setting.run.analyzers, setting.run.checks)
    setting.after[label] = run
    if setting.store is not None:
        under = RunStore(setting.store.folder / "after" / slug(label))
        under.create(force=True)
        write_run(run, under)
    found = {name: finding.to_json() for name, finding in run.findings.items()}
    return found


def _sink_change(setting: Setting, label: str) -> dict[str, Any] | None:
    before = sink_of(setting.run.trace, setting.run)
    after = sink_of(setting.after[label].trace, setting.run)
    return change_of(before, after) if before is not None and after is not None else None


def stored_result(store: RunStore | None, name: str) -> dict[str, Any] | None:
    if store is None or not (store.folder / "results" / f"{name}.json").is_file():
        return None
    return json.loads((store.folder / "results" / f"{name}.json").read_text(encoding="utf-8"))


def store_result(store: RunStore | None, name: str, data: Any) -> None:
    if store is not None:
        from sinklens.core.canonical import dumps

        store.write_text(f"results/{name}.json", dumps(data) + "\n")
