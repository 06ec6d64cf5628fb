"""`sinklens profile`: the main job."""

from __future__ import annotations

import re
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .together import several

if TYPE_CHECKING:
    from sinklens.pipeline.options import ProfileOptions
    from sinklens.pipeline.run import Run

NAME = "profile"
HELP = "Profile a model: sinks, massive activations, Super Experts, and whether the numbers can be trusted."
EXAMPLES = (
    "Examples:  sinklens profile  ·  sinklens profile -m gpt2 --prompts data.jsonl:text -n 200  ·  "
    "sinklens profile -m ./checkpoint --fail-if 'primary-sinks.sink_rate > 90'  ·  "
    "sinklens profile -m ./vlm --images photos --question 'What is this?'  ·  "
    "sinklens profile --resume runs/gpt2-...  ·  torchrun --nproc-per-node 4 -m sinklens profile -m gpt2 -n 1000"
)

Model = Annotated[
    str | None,
    typer.Option(
        "-m", "--model", help="Alias, org/name[@revision], local folder or bundled:NAME. [default: bundled]"
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        help="corpus:NAME, file.txt, file.jsonl[:field] (with pictures if its lines have image) or hf:dataset[...].",
    ),
]
Images = Annotated[
    str | None,
    typer.Option(
        "--images", help="A picture, a folder of pictures, or file.jsonl with image and question per line."
    ),
]
Question = Annotated[str | None, typer.Option(help="Asked about every picture that comes without one.")]
Count = Annotated[int | None, typer.Option("-n", "--n", help="Number of prompts.")]
SeqLen = Annotated[
    int | None, typer.Option("--seq-len", help="Cut prompts to this many tokens. [default: 512]")
]
Analyzers = Annotated[
    str | None,
    typer.Option(
        "--analyzers",
        help="Comma-separated, with parameters as name:field=value; all for every one. [default: see ls analyzers]",
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
DeviceMap = Annotated[
    str | None, typer.Option("--device-map", help="Passed to transformers, for instance auto.")
]
Stream = Annotated[
    str,
    typer.Option(
        "--stream",
        help="Read blocks from disk one at a time: on, off, or auto for models larger than memory.",
    ),
]
StreamBudget = Annotated[
    str | None,
    typer.Option(
        "--stream-budget", help="Memory for states between blocks, as 2GB; more goes to disk. [default: 2GiB]"
    ),
]
TensorParallel = Annotated[
    bool,
    typer.Option("--tensor-parallel", help="Spread each layer over the processes that torchrun started."),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Commit, branch or tag on the hub.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Backend = Annotated[
    str | None,
    typer.Option(
        "--backend", help="hf, transformer-lens or nnsight; see `sinklens ls backends`. [default: hf]"
    ),
]
Remote = Annotated[
    bool, typer.Option("--remote", help="Run on NDIF through nnsight; nothing is loaded here.")
]
Offline = Annotated[bool, typer.Option("--offline", help="Use local files only.")]
Preset = Annotated[str | None, typer.Option(help="A paper's protocol; see `sinklens ls presets`.")]
Mode = Annotated[str, typer.Option(help="faithful: logits bit-identical; fused: one pass, faster.")]
Bos = Annotated[str, typer.Option(help="auto, on or off.")]
Template = Annotated[bool, typer.Option("--chat-template", help="Wrap prompts in the chat template.")]
Pack = Annotated[bool, typer.Option("--pack", help="Join documents into windows of the full length.")]
Seed = Annotated[int, typer.Option(help="Seed of the prompt sample, controls and random tokens.")]
BatchSize = Annotated[int | None, typer.Option(help="Most prompts in a batch.")]
Keep = Annotated[int, typer.Option(help="Strongest positions kept per prompt.")]
SampleQueries = Annotated[
    str | None,
    typer.Option(
        help="Estimate attention from this many query rows per prompt (512) or this share (0.1), with standard errors."
    ),
]
SinkDimsOf = Annotated[
    str | None,
    typer.Option(
        "--sink-dims",
        help="Of visual sinks: published, third-party, or numbers as in 1415,2533. [default: found on the model]",
    ),
]
Verify = Annotated[
    bool | None,
    typer.Option(
        "--verify/--no-verify",
        help="Remove the causes found, beside controls, on a few prompts. [default: if that takes under a minute]",
    ),
]
Sensitive = Annotated[
    bool,
    typer.Option(
        "--sensitivity",
        help="Measure again without BOS, with random tokens, at other lengths, in other dtypes, ...",
    ),
]
Out = Annotated[Path | None, typer.Option(help="Run folder. [default: runs/MODEL-TIME]")]
Force = Annotated[bool, typer.Option("--force", help="Replace a run that is in --out.")]
Resume = Annotated[Path | None, typer.Option(help="Continue an interrupted run folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the JSON document and nothing else.")]
FailIf = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-if", help="Exit with 6 if this holds, e.g. 'primary-sinks.sink_rate > 90'; may be repeated."
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan with predicted memory, disk and time.")
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress on stderr.")]
NoText = Annotated[bool, typer.Option("--no-text", help="Keep tokens out of the report.")]


def command(
    context: typer.Context,
    model: Model = None,
    prompts: Prompts = None,
    images: Images = None,
    question: Question = None,
    n: Count = None,
    seq_len: SeqLen = None,
    analyzers: Analyzers = None,
    preset: Preset = None,
    mode: Mode = "faithful",
    bos: Bos = "auto",
    chat_template: Template = False,
    pack: Pack = False,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    keep_positions: Keep = 48,
    sample_queries: SampleQueries = None,
    sink_dims: SinkDimsOf = None,
    verify: Verify = None,
    sensitivity: Sensitive = False,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    stream: Stream = "auto",
    stream_budget: StreamBudget = None,
    tensor_parallel: TensorParallel = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    backend: Backend = None,
    remote: Remote = False,
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
    options = chosen_options(context.params)
    if several():
        run_together(context.params, options)
        return
    if dry_run:
        from .dry_run import print_plan

        print_plan(model, options, as_json=as_json)
        return
    run_profile(context.params, options)


def chosen_options(given: dict[str, Any]) -> ProfileOptions:
    """The options of the command line, all of them checked before anything is opened."""
    from dataclasses import fields

    from sinklens.core.errors import UsageError
    from sinklens.pipeline.backends import chosen_backend
    from sinklens.pipeline.gate import check_paths
    from sinklens.pipeline.options import ProfileOptions, with_preset
    from sinklens.pipeline.prepare import analyzers_for
    from sinklens.pipeline.resuming import analyzers_before

    wanted = names_in(given["analyzers"])
    settings: dict[str, Any] = {
        field.name: given[field.name] for field in fields(ProfileOptions) if field.name in given
    }
    settings |= {"analyzers": wanted, "preset": None}
    if given["resume"] is not None:
        refuse_beside_resume({name: given[name] for name in ("model", "out", "preset")}, settings)
    options = ProfileOptions(**settings)
    if given["preset"] is not None:
        options = with_preset(options, given["preset"], given_options(settings))
    if options.stream == "off" and options.stream_budget is not None:
        raise UsageError(
            "--stream-budget is memory for a model that is streamed, and --stream off was asked for.",
            hint="Leave out one of the two.",
        )
    chosen_backend(options)
    names = [analyzer.name for analyzer in analyzers_for(options)]
    if given["fail_if"]:
        check_paths(given["fail_if"], names if given["resume"] is None else analyzers_before(given["resume"]))
    return options


def names_in(text: str | None) -> tuple[str, ...]:
    """The items of a comma-separated option, none where it is left out.

    Raises:
        UsageError: It was given and holds none.
    """
    from sinklens.core.errors import UsageError

    found = tuple(item.strip() for item in (text or "").split(",") if item.strip())
    if text is not None and not found:
        raise UsageError("--analyzers names no analyzer.", hint="Leave it out, or see: sinklens ls analyzers")
    return found


def run_profile(given: dict[str, Any], options: ProfileOptions) -> None:
    """Profile, then `conclude`."""
    from sinklens.pipeline.profile import profile

    from .console import ConsoleListener

    listener = ConsoleListener(quiet=given["quiet"])
    try:
        run = profile(given["model"], listener=listener, **_run_settings(given, options))
    finally:
        listener.close()
    conclude(run, given)


def _run_settings(given: dict[str, Any], options: ProfileOptions) -> dict[str, Any]:
    """Where a run goes and what it does; one that is resumed knows both itself."""
    resume = given["resume"]
    return {
        "out": None if resume else given["out"] or Path("runs") / run_name(given["model"]),
        "force": given["force"],
        "resume": resume,
        "argv": sys.argv,
        "options": None if resume else options,
    }


def run_together(given: dict[str, Any], options: ProfileOptions) -> None:
    """The same by several processes, of which one talks."""
    from sinklens.pipeline.streamed_blocks import sharing_memory
    from sinklens.pipeline.together import profile_together, refuse_alone

    from .console import ConsoleListener
    from .dry_run import print_plan
    from .together import one_voice

    model = given["model"]
    with one_voice(on_devices=options.tensor_parallel or given["resume"] is not None) as team:
        refuse_alone(options, team)
        if given["dry_run"]:
            if team.leads:
                shared = sharing_memory(options, team.local_size)
                print_plan(model, options, as_json=given["as_json"], processes=team.size, one_memory=shared)
            return
        listener = ConsoleListener(quiet=given["quiet"])
        try:
            run = profile_together(model, team, listener=listener, **_run_settings(given, options))
        finally:
            listener.close()
        if run is not None:
            conclude(run, given)


def conclude(run: Run, given: dict[str, Any]) -> None:
    """Report, print, and hold the outcome against the conditions."""
    from sinklens.pipeline.gate import check_gate

    from .console import print_json, print_run

    report = run.report(include_text=not given["no_text"])
    if given["as_json"]:
        print_json(run.document)
    else:
        print_run(run, report)
    for expression in given["fail_if"] or []:
        check_gate(expression, run.document)


def refuse_beside_resume(names: dict[str, Any], settings: dict[str, Any]) -> None:
    """A resumed run takes everything from its manifest; an option that would be ignored is refused."""
    from sinklens.core.errors import UsageError

    given = [name for name, value in names.items() if value is not None] + sorted(given_options(settings))
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UsageError(
            f"A resumed run takes its model and options from its manifest; {flags} would be ignored.",
            hint="Leave it out, or start another run.",
        )


def given_options(settings: dict[str, Any]) -> set[str]:
    """The options that differ from their defaults: those win over a preset."""
    from sinklens.pipeline.options import ProfileOptions

    defaults = ProfileOptions()
    return {name for name, value in settings.items() if value != getattr(defaults, name)}


def run_name(model: str | None, what: str = "") -> str:
    """A folder name for a run: the model's last name, what was done if it was no profile, and the time."""
    last = (model or "default").rstrip("/").split("/")[-1].removeprefix("bundled:")
    name = re.sub(r"[^\w.-]+", "-", last).strip("-") or "model"
    return f"{name}-{what}{'-' if what else ''}{datetime.now():%Y%m%d-%H%M%S}"
