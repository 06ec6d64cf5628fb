"""Mitigations as controlled experiments: profile, calibrate, judge on other items, profile again, verdict."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sinklens.core.counts import counted, verb
from sinklens.core.errors import DataError, InterruptedRun, ModelError, UsageError
from sinklens.evaluation.splits import refuse_overlap
from sinklens.mitigations.recipes import Recipe
from sinklens.models.fingerprint import fingerprint
from sinklens.models.spec import OpenedModel
from sinklens.tracers.backends import backend_of, modes_restored
from sinklens.tracers.store import RunStore

from .divergence import QUESTIONS, of_prompt
from .judging import (
    Result,
    evaluation_rows,
    plain_columns,
)
from .listener import Listener
from .mitigate_options import MitigateOptions, stored_options
from .mitigate_setup import Job, assigned, entry, is_run_folder, jobs, of_run, options_from, recommended
from .mitigation_controls import told
from .mitigation_found import fits, with_finders, with_found
from .mitigation_run import REQUEST, MitigationRun, slug, write_results
from .mitigation_sinks import with_dims
from .mitigation_stages import Setting, judge_job, store_result, stored_result
from .prepare import Prepared, model_request, prepare
from .run import Run, load_run
from .session import Session
from .sink_change import sink_of
from .watched import watched


def mitigate(
    model: Any = None,
    methods: Any = (),
    *,
    tasks: Any = (),
    recipes: Any = (),
    tokenizer: Any = None,
    processor: Any = None,
    out: str | Path | None = None,
    force: bool = False,
    resume: str | Path | None = None,
    listener: Listener | None = None,
    progress: bool = True,
    argv: list[str] | None = None,
    options: MitigateOptions | None = None,
    **settings: Any,
) -> MitigationRun:
    """Put mitigations on a model and say what each does: to the sink, to a task, and in milliseconds.

    Args:
        model: As of `profile`; or a run (or its folder), whose model and prompts are taken.
        methods: Mitigations, their names, or one string as of `--with`.
        tasks: Tasks or names of such.
        recipes: Recipes or files, put on as they are.
        tokenizer, processor: For a model in memory; prompts and tasks with pictures need the latter.
        out: Run folder to write; None keeps everything in memory.
        resume: Folder of an interrupted run; finished mitigations are not run again.
        progress: In a notebook, show how far it is in one line under the cell; elsewhere nothing is shown.
        options: All options at once; or give them as keywords (`calibrate=True`, `seed`, ...), those of `profile`
            (`prompts`, `n`, `dtype`, ...) included.

    Returns:
        `.evaluation.to_frame()`, `.recipe`, `.verdict`, `.report(path)`, `.after["label"]`, and the findings of the
        unchanged model as attributes.

    Raises:
        SinklensError: The model, a task or a mitigation cannot be used; splits overlap; a self-check failed.
    """
    if resume is not None:
        with watched(listener, progress) as heard:
            return _resumed(Path(resume), model, (tokenizer, processor), heard, argv)
    asked = options or options_from(methods, tasks, recipes, settings)
    if isinstance(model, Run) or is_run_folder(model):
        model, asked = of_run(model, asked)
    held = model.module if isinstance(model, OpenedModel) else model
    with modes_restored(held), watched(listener, progress) as heard:
        return _start(model, (tokenizer, processor), asked, out, force, heard, argv)


def _start(
    model: Any,
    readers: tuple[Any, Any],
    options: MitigateOptions,
    out: str | Path | None,
    force: bool,
    listener: Listener,
    argv: list[str] | None,
) -> MitigationRun:
    options = with_finders(options, jobs(options))
    wanted = jobs(options)  # a misspelt mitigation is told before a large model is loaded
    if out is None:
        prepared = prepare(model, readers[0], options.profile, listener, readers[1])
        return _run(prepared, options, wanted, None, listener, argv, None)
    store = RunStore(out)
    with store.created(force=force, unless=(REQUEST,)), store.locked():
        _clear(store)
        prepared = prepare(model, readers[0], options.profile, listener, readers[1])
        request = model_request(model, prepared.opened)
        store.write_text(REQUEST, json.dumps(options.request(request), indent=1) + "\n")
        return _run(prepared, options, wanted, store, listener, argv, request)


def _clear(store: RunStore) -> None:
    """Take away what an earlier run left in the folder; it would be taken for this one's."""
    store.manifest_path.unlink(missing_ok=True)
    for name in ("results", "after", "recipes"):
        shutil.rmtree(store.folder / name, ignore_errors=True)


def _resumed(
    folder: Path, model: Any, readers: tuple[Any, Any], listener: Listener, argv: list[str] | None
) -> MitigationRun:
    asked, options = stored_options(folder / REQUEST)
    if model is None and asked is None:
        raise UsageError(
            f"The run in {folder} was started from a model in memory.",
            hint="Give it: sl.mitigate(model, resume=...)",
        )
    store = RunStore(folder)
    with store.locked():
        prepared = prepare(
            model if model is not None else asked, readers[0], options.profile, listener, readers[1]
        )
        return _run(prepared, options, jobs(options), store, listener, argv, asked)


def _run(
    prepared: Prepared,
    options: MitigateOptions,
    jobs: list[Job],
    store: RunStore | None,
    listener: Listener,
    argv: list[str] | None,
    request: str | None,
) -> MitigationRun:
    prepared = replace(prepared, opened=_as_transformers(prepared.opened))
    opened = prepared.opened
    jobs = with_dims(jobs, prepared, options.profile.sink_dims, listener)
    for job in jobs:
        if job.recipe is not None:
            job.recipe.check(opened)
        if not job.nothing:
            fits(job.method, opened)
    task, given, calibration = assigned(opened, options, any(job.calibrate for job in jobs))
    for job in jobs:
        if job.recipe is not None:
            for one in given:
                refuse_overlap(job.recipe.calibration.get("items") or (), one.split)
    base = _base_run(prepared, options, store, listener, argv, request)
    jobs = with_found(jobs, base, opened, prepared.prompts.prompts, given, listener)
    setting = Setting(opened, options, listener, given, calibration, task, prepared, base, store)
    results: list[Result] = []
    try:
        _ask_baseline(setting)
        for job in jobs:
            results.append(judge_job(setting, job))
    except KeyboardInterrupt:
        raise _interrupted(setting, results, len(jobs)) from None
    return _finished(setting, results)


def _as_transformers(opened: OpenedModel) -> OpenedModel:
    """The model that is measured, asked and edited alike, also where another library holds it.

    Raises:
        ModelError: That would be another model than the one given.
    """
    found = backend_of(opened).for_experiments(opened)
    if isinstance(found, str):
        raise ModelError(
            "Mitigations cannot be judged on this model.",
            detail=found,
            hint="Take the hooks or edits off, or give the transformers model.",
        )
    return found


def _base_run(
    prepared: Prepared,
    options: MitigateOptions,
    store: RunStore | None,
    listener: Listener,
    argv: list[str] | None,
    request: str | None,
) -> Run:
    """The run of the unchanged model; of a resumed one what is there."""
    before = store.read_manifest() if store is not None and store.manifest_path.is_file() else None
    resumed = before is not None and before.get("status") in ("running", "complete")
    if store is not None and resumed and before is not None and before.get("status") == "complete":
        run = load_run(store.folder)
        if asdict(run.trace.info)["files_sha256"] != prepared.opened.info.files_sha256:
            raise DataError(
                "The run cannot be resumed: the model's files changed since it was started.",
                hint="Start it again into another folder with --out.",
            )
        return run
    try:
        return Session(prepared, options.profile, store, listener, argv, request).run(
            before if resumed else None
        )
    except InterruptedRun as stopped:
        hint = f"Continue: sinklens mitigate --resume {store.folder}" if store else None
        raise InterruptedRun(stopped.what, hint=hint) from None


def _ask_baseline(setting: Setting) -> None:
    """The unchanged model's answers, and the contexts on which predictions are compared."""
    share = max(1, QUESTIONS // len(setting.given))
    for one in setting.given:
        setting.probes += one.task.probes(setting.opened, one.split.items[:share])[:share]
    if not setting.probes:
        setting.probes = [of_prompt(prompt) for prompt in setting.prepared.prompts.prompts[:QUESTIONS]]
    mark = {one.task.name: one.split.sha256 for one in setting.given}
    stored = stored_result(setting.store, "baseline")
    if stored is not None and stored["splits"] == mark:
        setting.baseline = stored["columns"]
        return
    if stored is not None:
        raise DataError(
            "The run cannot be resumed: a task's items changed since it was started.",
            hint="Start it again into another folder with --out.",
        )
    for one in setting.given:
        items = counted(len(one.split), "item")
        setting.listener.stage(f"Task {one.task.name}: {items}, the model as it is")
        answers = one.task.ask(setting.opened, one.split.items, setting.listener.progress)
        setting.baseline[one.task.name] = plain_columns(answers)
    store_result(setting.store, "baseline", {"splits": mark, "columns": setting.baseline})


def _finished(setting: Setting, results: list[Result]) -> MitigationRun:
    """The run with its verdicts; written if it has a folder."""
    rows, verdicts = evaluation_rows(setting.given, setting.baseline, results, setting.options.seed)
    before = sink_of(setting.run.trace, setting.run)
    entries = []
    for result in results:
        controls = told(
            result.controls, setting.given, setting.baseline, result.judged, before, setting.options.seed
        )
        entries.append(entry(result, verdicts[result.label], controls))
    best = recommended(entries, rows)
    for one in entries:
        one["recommended"] = one["label"] == best
    base, after = setting.run, dict(setting.after)
    if setting.store is not None:
        for result in results:
            folder = setting.store.folder / "after" / slug(result.label)
            if result.label not in after and (folder / "manifest.json").is_file():
                after[result.label] = load_run(folder)
    recipes = {
        r.label: Recipe(**{k: v for k, v in r.recipe.items() if k in Recipe.__dataclass_fields__})
        for r in results
        if r.recipe is not None
    }
    base.trace.manifest["mitigation"] = _described(setting)
    run = MitigationRun(
        base.trace,
        base.analyzers,
        base.checks,
        base.folder,
        base.findings,
        rows=rows,
        entries=entries,
        after=after,
        recipe=recipes.get(best) if best else None,
        recipes=recipes,
    )
    if setting.store is not None:
        write_results(run, setting.store)
    return run


def _described(setting: Setting) -> dict[str, Any]:
    """What was asked, for the manifest."""
    return {
        "tasks": [{**one.task.describe(), "report": one.split.describe()} for one in setting.given],
        "calibration": setting.calibration.describe() if setting.calibration else None,
        "seed": setting.options.seed,
        "fingerprint": fingerprint(setting.opened),
    }


def _interrupted(setting: Setting, results: list[Result], total: int) -> InterruptedRun:
    if setting.store is None:
        return InterruptedRun("Stopped. Nothing was saved, because the run has no folder.")
    if results:
        _finished(setting, results)
    are = verb(len(results), "is", "are")
    return InterruptedRun(
        f"Stopped. {len(results)} of {counted(total, 'mitigation')} {are} judged and saved.",
        hint=f"Continue: sinklens mitigate --resume {setting.store.folder}",
    )
