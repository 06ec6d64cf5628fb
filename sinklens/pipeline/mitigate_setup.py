"""What a mitigate run is asked to do, made ready: mitigations under names, tasks, and the items of each half."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sinklens.core.canonical import plain
from sinklens.core.errors import UsageError
from sinklens.evaluation.splits import CalibrationSplit, ReportSplit, given_splits, refuse_overlap
from sinklens.evaluation.tasks import Task, read_task, tasks_for
from sinklens.mitigations import Method
from sinklens.mitigations.asking import chosen_methods, label_of
from sinklens.mitigations.calibration import Search, changed, refuse_unknown_objective
from sinklens.mitigations.recipes import Recipe, load_recipe
from sinklens.models.spec import OpenedModel

from .judging import Assignment, Result, one_word
from .mitigate_options import MitigateOptions
from .run import Run, load_run


def options_from(methods: Any, tasks: Any, recipes: Any, settings: dict[str, Any]) -> MitigateOptions:
    """Options from keywords; those that `MitigateOptions` lacks belong to the profile."""
    own = {key: settings.pop(key) for key in list(settings) if key in MitigateOptions.__dataclass_fields__}
    profile = own.pop("profile", None) or replace(MitigateOptions(methods=("act",)).profile, **settings)
    return MitigateOptions(
        methods=_several(methods), tasks=_several(tasks), recipes=_several(recipes), profile=profile, **own
    )


def _several(given: Any) -> tuple[Any, ...]:
    if isinstance(given, str):
        return tuple(part.strip() for part in given.split(",") if part.strip())
    return tuple(given) if isinstance(given, list | tuple) else (given,)


def is_run_folder(model: Any) -> bool:
    return isinstance(model, str | Path) and (Path(model) / "manifest.json").is_file()


def of_run(given: Any, options: MitigateOptions) -> tuple[str, MitigateOptions]:
    """Model and prompts of a run; what it left out is not asked of it."""
    run = given if isinstance(given, Run) else load_run(given)
    request = dict(run.trace.manifest.get("request") or {})
    model = request.pop("model", None)
    if model is None or request.pop("prompts_given", None):
        raise UsageError(
            "The run was made from objects in memory, so its model or prompts cannot be opened again.",
            hint="Give the model itself: sl.mitigate(model, ...)",
        )
    kept = ("prompts", "images", "question", "n", "seq_len", "bos", "chat_template", "sink_dims", "pack", "seed",
            "dtype", "device", "device_map", "revision", "trust_remote_code")  # fmt: skip
    return model, replace(
        options, profile=replace(options.profile, **{key: request[key] for key in kept if key in request})
    )


@dataclass
class Job:
    """One mitigation to be judged: given with its parameters, as a recipe, or to be calibrated.

    Attributes:
        replaced: Parameters that were given and that the calibration chooses itself.
        nothing: Why the model has nothing that it could edit, so that it is not put on.
    """

    label: str
    method: Method
    recipe: Recipe | None = None
    calibrate: bool = False
    replaced: tuple[str, ...] = ()
    nothing: str = ""


def jobs(options: MitigateOptions) -> list[Job]:
    """The mitigations in the order they are judged, under names of their own."""
    found: list[Job] = []
    if options.methods:
        calibrated = options.calibrate or options.calibration is not None
        for method in chosen_methods(options.methods):
            search = method.search() if calibrated else None
            if search is None:
                found.append(Job(label_of(method), method))
                continue
            # A value that the calibration replaces is not what is judged.
            label = f"{label_of(method, without=search.replaces)} (calibrated)"
            replaced = tuple(key for key in changed(method) if key in search.replaces)
            found.append(Job(label, method, calibrate=True, replaced=replaced))
    for given in options.recipes:
        recipe = given if isinstance(given, Recipe) else load_recipe(given)
        found.append(Job(f"{recipe.method} (recipe)", recipe.mitigation, recipe))
    _check_searches([search_of(job.method, options) for job in found if job.calibrate], options.search)
    seen: dict[str, int] = {}
    for job in found:
        seen[job.label] = seen.get(job.label, 0) + 1
        if seen[job.label] > 1:
            job.label += f" {seen[job.label]}"
    return found


def search_of(method: Method, options: MitigateOptions) -> Search:
    """How a method is calibrated: with those of the given settings that its search has."""
    wanted = method.search()
    assert wanted is not None
    defaults = {name: getattr(wanted, name) for name in getattr(wanted, "__dataclass_fields__", {})}
    settings = {key: value for key, value in options.search.items() if key in defaults}
    for key, value in settings.items():
        if isinstance(defaults[key], float) and not isinstance(value, int | float):
            raise UsageError(f"--search: {key} must be a number, got {value!r}.")
    search = method.search(**settings)
    assert search is not None
    return search


def _check_searches(searches: Sequence[Search], given: Mapping[str, Any]) -> None:
    """Refuse settings that would be ignored, and an unknown objective.

    Raises:
        UsageError: No search of this run has the setting, or nothing is calibrated at all.
    """
    had = sorted(
        {name for search in searches for name in getattr(search, "__dataclass_fields__", {})} - {"grid"}
    )
    unused = sorted(given.keys() - set(had))
    if unused and not searches:
        raise UsageError(
            "--search says how to choose parameters, and none are chosen here.",
            hint="Choose them with --calibrate, or leave --search out.",
        )
    if unused:
        raise UsageError(
            f"--search: no search of this run has a setting {unused[0]!r}.",
            detail=f"There are: {', '.join(had)}.",
        )
    for search in searches:
        refuse_unknown_objective(getattr(search, "objective", "supervised"))


def assigned(
    opened: OpenedModel, options: MitigateOptions, needed: bool
) -> tuple[Task | None, list[Assignment], CalibrationSplit | None]:
    """The tasks with the items to report on, and the task and items to choose on."""
    names = options.tasks or tasks_for(opened)[:1]
    if not names:
        raise UsageError(
            "No task was named, and none is made for this model.", hint="Give --task task:FILE.jsonl"
        )
    tasks = [t if isinstance(t, Task) else read_task(t, opened, n=options.n_items) for t in names]
    twice = {task.name for task in tasks if [t.name for t in tasks].count(task.name) > 1}
    if twice:
        raise UsageError(
            f"Two tasks are called {sorted(twice)[0]!r}.", hint="Rename a file, or name each task once."
        )
    if not needed:
        return None, [_to_report(task, _report(task, options)) for task in tasks], None
    if options.calibration is not None:
        own = options.calibration
        other = own if isinstance(own, Task) else read_task(own, opened, n=options.n_items)
        calibration, report = given_splits(tasks[0].name, other.items, _report(tasks[0], options).items)
        chosen_on = other
    else:
        calibration, report = tasks[0].split(
            calibration=options.calibration_items, report=options.report_items, seed=options.seed
        )
        chosen_on = tasks[0]
    chosen_on.check_part(calibration.items, "calibration split")
    given = [_to_report(tasks[0], report)]
    for task in tasks[1:]:
        given.append(_to_report(task, _report(task, options)))
        refuse_overlap(calibration, given[-1].split)
    return chosen_on, given, calibration


def _to_report(task: Task, split: ReportSplit) -> Assignment:
    task.check_part(split.items, "report split")
    return Assignment(task, split)


def _report(task: Task, options: MitigateOptions) -> ReportSplit:
    if options.report_items is None or options.report_items >= len(task.items):
        return task.everything()
    _, report = task.split(calibration=len(task.items) - options.report_items, seed=options.seed)
    return report


def entry(result: Result, verdicts: dict[str, Any], controls: list[dict[str, Any]]) -> dict[str, Any]:
    """One mitigation in the document; `controls` as of `mitigation_controls.told`."""
    word = one_word(verdicts)
    texts = [v.text for v in verdicts.values()]
    several = len(verdicts) > 1 and result.acted
    named = [f"{task}: {v.text}" for task, v in verdicts.items()] if several else texts[:1]
    return {
        "label": result.label,
        "name": result.name,
        "parameters": plain(result.parameters),
        "acted": result.acted,
        "kept_unchanged": result.kept is not None,
        "verdict": {
            "judgement": str(word),
            "text": " ".join(named),
            "tasks": {
                task: {"judgement": str(v.judgement), "rule": v.rule, "text": v.text}
                for task, v in verdicts.items()
            },
        },
        "effect": {**result.effect, "text": result.said},
        "ledger": result.ledger,
        "cost": result.cost,
        "calibration": result.calibration,
        "findings": result.findings,
        "sink": result.sink,
        "controls": controls,
    }


def recommended(entries: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str | None:
    """Of the helpful ones the surest."""
    helpful = [entry["label"] for entry in entries if entry["verdict"]["judgement"] == "helpful"]
    sure = {
        label: min(
            (row["p_holm"] for row in rows if row["mitigation"] == label and row["role"] == "primary"),
            default=1.0,
        )
        for label in helpful
    }
    return min(sure, key=lambda label: sure[label]) if sure else None
