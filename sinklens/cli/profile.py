"""`sinklens profile`: the main job."""

from __future__ import annotations

import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

NAME = "profile"
HELP = "Profile a model: sinks, massive activations, Super Experts, and whether the numbers can be trusted."
EXAMPLES = (
    "Examples:  sinklens profile  ·  sinklens profile -m gpt2 --prompts data.jsonl:text -n 200  ·  "
    "sinklens profile -m ./checkpoint --fail-if 'primary-sinks.sink_rate > 90'  ·  "
    "sinklens profile --resume runs/gpt2-..."
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
        "--prompts", help="corpus:NAME, file.txt, file.jsonl[:field] or hf:dataset[:config[:split[:field]]]."
    ),
]
Count = Annotated[int | None, typer.Option("-n", "--n", help="Number of prompts.")]
SeqLen = Annotated[
    int | None, typer.Option("--seq-len", help="Cut prompts to this many tokens. [default: 512]")
]
Analyzers = Annotated[
    str | None,
    typer.Option("--analyzers", help="Comma-separated, with parameters as name:field=value. [default: all]"),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
DeviceMap = Annotated[
    str | None, typer.Option("--device-map", help="Passed to transformers, for instance auto.")
]
Revision = Annotated[str | None, typer.Option("--revision", help="Commit, branch or tag on the hub.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Offline = Annotated[bool, typer.Option("--offline", help="Use local files only.")]


def command(
    model: Model = None,
    prompts: Prompts = None,
    n: Count = None,
    seq_len: SeqLen = None,
    analyzers: Analyzers = None,
    preset: Annotated[str | None, typer.Option(help="A paper's protocol; see `sinklens ls presets`.")] = None,
    mode: Annotated[
        str, typer.Option(help="faithful: logits bit-identical; fused: one pass, faster.")
    ] = "faithful",
    bos: Annotated[str, typer.Option(help="auto, on or off.")] = "auto",
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Wrap prompts in the chat template.")
    ] = False,
    pack: Annotated[
        bool, typer.Option("--pack", help="Join documents into windows of the full length.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the prompt sample.")] = 0,
    batch_size: Annotated[int | None, typer.Option(help="Most prompts in a batch.")] = None,
    keep_positions: Annotated[int, typer.Option(help="Strongest positions kept per prompt.")] = 48,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Look once more without the Super Experts found.")
    ] = True,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    offline: Offline = False,
    out: Annotated[Path | None, typer.Option(help="Run folder. [default: runs/MODEL-TIME]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is in --out.")] = False,
    resume: Annotated[Path | None, typer.Option(help="Continue an interrupted run folder.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the JSON document and nothing else.")
    ] = False,
    fail_if: Annotated[
        list[str] | None,
        typer.Option("--fail-if", help="Exit with 6 if this holds, e.g. 'primary-sinks.sink_rate > 90'."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan with predicted memory, disk and time.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress on stderr.")] = False,
    no_text: Annotated[bool, typer.Option("--no-text", help="Keep tokens out of the report.")] = False,
) -> None:
    from sinklens.pipeline.gate import check_gate, check_path, parse_gate
    from sinklens.pipeline.options import ProfileOptions, with_preset

    from .console import ConsoleListener, print_json, print_run
    from .environment import quiet_libraries

    quiet_libraries(offline=offline)
    wanted = tuple(item.strip() for item in (analyzers or "").split(",") if item.strip())
    for expression in fail_if or []:
        check_path(parse_gate(expression)[0], wanted)
    settings: dict[str, Any] = {
        "prompts": prompts,
        "n": n,
        "seq_len": seq_len,
        "analyzers": wanted,
        "mode": mode,
        "bos": bos,
        "chat_template": chat_template,
        "pack": pack,
        "seed": seed,
        "batch_size": batch_size,
        "keep_positions": keep_positions,
        "verify": verify,
        "dtype": dtype,
        "device": device,
        "device_map": device_map,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    if resume is not None:
        refuse_beside_resume({"model": model, "out": out, "preset": preset}, settings)
    options = ProfileOptions(**settings)
    if preset is not None:
        options = with_preset(options, preset, given_options(settings))
    if dry_run:
        from .dry_run import print_plan

        print_plan(model, options, as_json=as_json)
        return
    from sinklens.pipeline.profile import profile

    folder = None if resume else out or Path("runs") / run_name(model)
    listener = ConsoleListener(quiet=quiet)
    try:
        run = profile(
            model,
            out=folder,
            force=force,
            resume=resume,
            listener=listener,
            argv=sys.argv,
            options=None if resume else options,
        )
    finally:
        listener.close()
    report = run.report(include_text=not no_text)
    if as_json:
        print_json(run.document)
    else:
        print_run(run, report)
    for expression in fail_if or []:
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


def run_name(model: str | None) -> str:
    """A folder name for a run: the model's last name and the time."""
    last = (model or "default").rstrip("/").split("/")[-1].removeprefix("bundled:")
    name = re.sub(r"[^\w.-]+", "-", last).strip("-") or "model"
    return f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
