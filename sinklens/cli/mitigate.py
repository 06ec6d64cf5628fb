"""`sinklens mitigate`: mitigations put on a model, calibrated on one part of a task and judged on the other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .profile import (
    Analyzers,
    AsJson,
    BatchSize,
    Bos,
    Count,
    Device,
    DeviceMap,
    DryRun,
    Dtype,
    FailIf,
    Force,
    Images,
    Model,
    NoText,
    Offline,
    Prompts,
    Question,
    Quiet,
    Revision,
    SeqLen,
    SinkDimsOf,
    Template,
    Trust,
    names_in,
    run_name,
)
from .unstreamed import Unstreamed

if TYPE_CHECKING:
    from sinklens.pipeline.mitigate_options import MitigateOptions
    from sinklens.pipeline.mitigation_run import MitigationRun

NAME = "mitigate"
HELP = "Put mitigations on a model: what each does to the sink and to a task, judged on items it was not chosen on."
EXAMPLES = (
    "Examples:  sinklens mitigate --with zero-tuning:gamma=0.5,act  ·  "
    "sinklens mitigate -m ./checkpoint --with zero-tuning,act --task task:questions.jsonl --calibrate  ·  "
    "sinklens mitigate runs/gpt2-... --recipe recipe.json --task ppl  ·  sinklens mitigate --resume runs/..."
)
PROFILED = ("prompts", "images", "question", "n", "seq_len", "bos", "chat_template", "sink_dims", "batch_size",
            "dtype", "device", "device_map", "revision", "trust_remote_code", "seed")  # fmt: skip


RunFolder = Annotated[
    str | None, typer.Argument(help="Run folder of `sinklens profile`: its model and prompts are taken.")
]
Methods = Annotated[
    str | None,
    typer.Option(
        "--with", help="Mitigations: name:parameter=value, comma-separated. See: sinklens ls mitigations"
    ),
]
RecipeFiles = Annotated[
    list[str] | None, typer.Option("--recipe", help="A recipe file, put on as it is; may be repeated.")
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        help="A name, task:FILE.jsonl, hf:dataset[:config[:split]] or lm-eval:NAME, with :setting=value; may be "
        "repeated. See: sinklens ls tasks",
    ),
]
Calibrate = Annotated[
    bool, typer.Option("--calibrate", help="Choose parameters on a part of the first task.")
]
CalibrationTask = Annotated[
    str | None,
    typer.Option("--calibration", help="Choose them on this task instead; it must not overlap."),
]
CalibrationItems = Annotated[
    float, typer.Option("--calibration-items", help="Items to choose on: a count, or a share below 1.")
]
ReportItems = Annotated[int | None, typer.Option("--report-items", help="Most items to report on.")]
ItemCount = Annotated[
    int | None, typer.Option("--n-items", help="Items taken of each task before it is split.")
]
Controls = Annotated[
    int,
    typer.Option(
        "--controls",
        help="Random draws per control of a structural method (pruning, protection); 0: none.",
    ),
]
SearchSettings = Annotated[
    str | None,
    typer.Option(
        "--search",
        help="How to choose: objective=unsupervised, units=shared, keep=surely-better, share=0.5, ...",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the splits, the resampling and the prompt sample.")]
Out = Annotated[Path | None, typer.Option(help="Run folder. [default: runs/MODEL-mitigate-TIME]")]
Resume = Annotated[Path | None, typer.Option(help="Continue an interrupted run folder.")]


def command(
    context: typer.Context,
    run: RunFolder = None,
    model: Model = None,
    methods: Methods = None,
    recipe: RecipeFiles = None,
    task: Tasks = None,
    calibrate: Calibrate = False,
    calibration: CalibrationTask = None,
    calibration_items: CalibrationItems = 0.4,
    report_items: ReportItems = None,
    n_items: ItemCount = None,
    controls: Controls = 2,
    search: SearchSettings = None,
    seed: Seed = 0,
    prompts: Prompts = None,
    images: Images = None,
    question: Question = None,
    n: Count = None,
    seq_len: SeqLen = None,
    analyzers: Analyzers = None,
    bos: Bos = "auto",
    chat_template: Template = False,
    sink_dims: SinkDimsOf = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    stream: Unstreamed = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    offline: Offline = False,
    out: Out = None,
    force: Force = False,
    resume: Resume = None,
    as_json: AsJson = False,
    fail_if: FailIf = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    no_text: NoText = False,
) -> None:
    from .environment import quiet_libraries

    quiet_libraries(offline=offline)
    given = context.params
    if resume is not None:
        check_resumed(given)
        run_mitigate(given, None)
        return
    options = chosen_options(given)
    if dry_run:
        from .dry_run import print_mitigation_plan

        print_mitigation_plan(_source(given), options, as_json=as_json)
        return
    run_mitigate(given, options)


def chosen_options(given: dict[str, Any]) -> MitigateOptions:
    """The options of the command line, checked before anything is opened."""
    from dataclasses import replace

    from sinklens.mitigations.asking import chosen_methods
    from sinklens.pipeline.mitigate_options import ANALYZERS, MitigateOptions
    from sinklens.pipeline.mitigation_gate import check_conditions
    from sinklens.pipeline.options import ProfileOptions
    from sinklens.pipeline.prepare import analyzers_for

    wanted = names_in(given["analyzers"])
    profile = ProfileOptions(
        **{name: given[name] for name in PROFILED}, analyzers=wanted or ANALYZERS, verify=False
    )
    analyzers_for(profile)
    methods = tuple(item.strip() for item in (given["methods"] or "").split(",") if item.strip())
    if methods:
        chosen_methods(methods)
    options = MitigateOptions(
        methods=methods,
        recipes=tuple(given["recipe"] or ()),
        tasks=tuple(given["task"] or ()),
        controls=given["controls"],
        search=_search(given["search"]),
        profile=profile,
    )
    items = given["calibration_items"]
    options = replace(
        options,
        calibrate=given["calibrate"],
        calibration=given["calibration"],
        calibration_items=items if items < 1 else int(items),
        report_items=given["report_items"],
        n_items=given["n_items"],
        seed=given["seed"],
    )
    check_conditions(given["fail_if"] or (), options)
    return options


def check_resumed(given: dict[str, Any]) -> None:
    """The options beside `--resume`, checked before anything is opened."""
    from sinklens.pipeline.mitigate_options import stored_options
    from sinklens.pipeline.mitigation_gate import check_conditions
    from sinklens.pipeline.mitigation_run import REQUEST

    _refuse_beside_resume(given)
    if given["fail_if"]:
        check_conditions(given["fail_if"], stored_options(given["resume"] / REQUEST)[1])


def run_mitigate(given: dict[str, Any], options: MitigateOptions | None) -> None:
    """Judge, report, print, and hold the outcome against the conditions."""
    from sinklens.pipeline.gate import check_gate
    from sinklens.pipeline.mitigate import mitigate
    from sinklens.pipeline.mitigation_gate import gate_document, require_acted

    from .console import ConsoleListener, print_json
    from .mitigated import print_mitigated

    source = _source(given)
    listener = ConsoleListener(quiet=given["quiet"])
    try:
        found: MitigationRun = mitigate(
            source,
            out=None if given["resume"] else given["out"] or Path("runs") / run_name(source, "mitigate"),
            force=given["force"],
            resume=given["resume"],
            listener=listener,
            argv=sys.argv,
            options=options,
        )
    finally:
        listener.close()
    report = found.report(include_text=not given["no_text"])
    if given["as_json"]:
        print_json(found.document)
    else:
        print_mitigated(found, report)
    for expression in given["fail_if"] or []:
        check_gate(expression, gate_document(found))
    require_acted(found)


def _source(given: dict[str, Any]) -> str | None:
    """The run folder or the model."""
    from sinklens.core.errors import UsageError

    if given["run"] is not None and given["model"] is not None:
        raise UsageError("A run folder and a model were both given.", hint="Leave one of them out.")
    return given["run"] if given["run"] is not None else given["model"]


def _search(text: str | None) -> dict[str, Any]:
    """`objective=unsupervised,share=0.5` as settings of the searches that have them."""
    from sinklens.core.errors import UsageError
    from sinklens.core.suggest import did_you_mean
    from sinklens.mitigations.act_search import ActSearch
    from sinklens.mitigations.calibration import GridSearch
    from sinklens.mitigations.var_search import VarSearch
    from sinklens.mitigations.zero_tuning_search import ZeroTuningSearch

    known = {
        name
        for cls in (ZeroTuningSearch, ActSearch, VarSearch, GridSearch)
        for name in cls.__dataclass_fields__
    } - {"grid"}
    found: dict[str, Any] = {}
    for part in filter(None, (text or "").split(",")):
        key, equals, value = part.strip().partition("=")
        key = key.replace("-", "_")
        if key not in known or not equals:
            raise UsageError(
                f"--search: no search has a setting {key!r}."
                if equals
                else f"--search: {key} needs a value.",
                detail=did_you_mean(key, known) or f"There are: {', '.join(sorted(known))}.",
            )
        try:
            numbers = tuple(float(number) for number in value.split("+"))
            found[key] = numbers if key.endswith("ladder") else numbers[0]
        except ValueError:
            found[key] = value
    return found


def _refuse_beside_resume(given: dict[str, Any]) -> None:
    from sinklens.core.errors import UsageError

    defaults = {"bos": "auto", "dtype": "auto", "seed": 0, "calibration_items": 0.4, "controls": 2}
    allowed = {"resume", "as_json", "fail_if", "quiet", "no_text", "offline"}
    changed = sorted(
        name for name, value in given.items() if name not in allowed and value and value != defaults.get(name)
    )
    if changed:
        flags = ", ".join(
            "--with" if name == "methods" else "--" + name.replace("_", "-") for name in changed
        )
        raise UsageError(
            f"A resumed run takes its model and options from its folder; {flags} would be ignored.",
            hint="Leave it out, or start another run.",
        )
