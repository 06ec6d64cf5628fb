"""`sinklens probe`: experiments beside a profile."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .environment import quiet_libraries
from .profile import (
    AsJson,
    Bos,
    Count,
    Device,
    DeviceMap,
    Dtype,
    Force,
    Images,
    Model,
    Offline,
    Prompts,
    Quiet,
    Revision,
    SeqLen,
    SinkDimsOf,
    Template,
    Trust,
    run_name,
)
from .unstreamed import Unstreamed

if TYPE_CHECKING:
    from sinklens.pipeline.options import ProfileOptions
    from sinklens.pipeline.probe import Probe

app = typer.Typer(
    no_args_is_help=True, help="Experiments beside a profile: quantisation, streaming, pruning."
)

QUANTISATION = (
    "Examples:  sinklens probe quantisation --grid weights=4:activations=4  ·  "
    "sinklens probe quantisation -m ./moe --grid weights=8 --grid weights=4:experts=4:weights-by=tensor --json"
)
STREAMING = (
    "Examples:  sinklens probe streaming  ·  "
    "sinklens probe streaming -m ./checkpoint --prompts book.txt --cache 4+1020 --cache 1+1023"
)
PRUNING = (
    "Examples:  sinklens probe pruning -m vlm-shapes  ·  "
    "sinklens probe pruning -m ./vlm --images questions.jsonl --keep 0.25,0.5  ·  "
    "sinklens probe pruning -m ./vlm --with fastv,fastv:recency=true:sinks=dropped,divprune"
)
OPTIONS = (
    "prompts",
    "images",
    "chat_template",
    "sink_dims",
    "n",
    "seq_len",
    "bos",
    "seed",
    "dtype",
    "device",
    "device_map",
    "revision",
    "trust_remote_code",
)

Seed = Annotated[int, typer.Option(help="Seed of the prompt sample and the controls.")]
Out = Annotated[Path | None, typer.Option(help="Folder for probe.json. [default: runs/MODEL-PROBE-TIME]")]


@app.command(
    "quantisation",
    help="What quantising costs, and how much of it massive dims, sink tokens and Super Experts explain.",
    epilog=QUANTISATION,
)
def quantisation_command(
    context: typer.Context,
    model: Model = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid",
            help="How to quantise, as parameters of fake-quantisation; may be repeated. [default: weights=8]",
        ),
    ] = None,
    protect: Annotated[
        Path | None, typer.Option("--protect", help="protect.json of an earlier probe: what to keep.")
    ] = None,
    draws: Annotated[int, typer.Option("--draws", help="Random controls per grid.")] = 5,
    prompts: Prompts = None,
    n: Count = None,
    seq_len: SeqLen = None,
    bos: Bos = "auto",
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    stream: Unstreamed = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    offline: Offline = False,
    out: Out = None,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    from sinklens.pipeline.probe_quantisation import PROTECT, probe_quantisation

    from .probed import grid_of, print_places, print_quantisation

    quiet_libraries(offline=offline)
    grids = [grid_of(text) for text in grid or ["weights=8"]]
    settings = {"protect": protect, "draws": draws}
    found = _run("quantisation", probe_quantisation, context.params, grids, settings)
    if as_json:
        return
    for text, result in zip(grid or ["weights=8"], found.results, strict=True):
        print_quantisation(text, result)
    print_places(found, PROTECT)


@app.command(
    "streaming",
    help="Perplexity over long texts with a bounded cache: first tokens kept, dropped, at wrong positions.",
    epilog=STREAMING,
)
def streaming_command(
    context: typer.Context,
    model: Model = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            "--cache",
            help="First and recent tokens, as 4+508; may be repeated. [default: 4+508, or as many in all as the model "
            "was trained on, where that is known]",
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="Length of a text. [default: 2048, or all there is]")
    ] = None,
    chunk: Annotated[int, typer.Option("--chunk", help="Tokens per pass.")] = 1,
    prompts: Prompts = None,
    n: Annotated[int | None, typer.Option("-n", "--n", help="Number of texts. [default: 8]")] = None,
    bos: Bos = "auto",
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    stream: Unstreamed = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    offline: Offline = False,
    out: Out = None,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    from sinklens.pipeline.probe_streaming import probe_streaming

    from .probed import cache_of, print_places, print_streaming

    quiet_libraries(offline=offline)
    caches = [cache_of(text) for text in cache or []]
    found = _run("streaming", probe_streaming, context.params, caches, {"tokens": tokens, "chunk": chunk})
    if as_json:
        return
    for result in found.results:
        print_streaming(result)
    print_places(found)


@app.command(
    "pruning",
    help="What visual tokens cost when pruners take them: FastV and DivPrune, with and without what is known of sinks, "
    "against random tokens. Prompts need pictures, questions and answers.",
    epilog=PRUNING,
)
def pruning_command(
    context: typer.Context,
    model: Model = None,
    pruners: Annotated[
        str | None,
        typer.Option(
            "--with",
            help="Pruners: fastv (layer, queries, recency, padding, sigma, sinks) and divprune (sinks), as "
            "name:field=value, comma-separated; sinks are ranked, kept or dropped. [default: both with and without "
            "corrections]",
        ),
    ] = None,
    keep: Annotated[
        str, typer.Option("--keep", help="Shares of the visual tokens that stay, comma-separated.")
    ] = "0.25,0.5,0.75",
    draws: Annotated[int, typer.Option("--draws", help="Random controls per share.")] = 4,
    prompts: Prompts = None,
    images: Images = None,
    chat_template: Template = False,
    n: Count = None,
    sink_dims: SinkDimsOf = None,
    bos: Bos = "auto",
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    stream: Unstreamed = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    offline: Offline = False,
    out: Out = None,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    from sinklens.evaluation.pruners import USUAL, chosen_pruners
    from sinklens.pipeline.probe_pruning import probe_pruning

    from .probed import print_places, print_pruning, shares_of

    quiet_libraries(offline=offline)
    chosen = chosen_pruners(pruners.split(",")) if pruners else USUAL
    found = _run(
        "pruning", probe_pruning, context.params, list(chosen), {"keeps": shares_of(keep), "draws": draws}
    )
    if as_json:
        return
    print_pruning(found.results[0])
    print_places(found)


def _run(name: str, probe: Any, given: dict[str, Any], what: list[Any], settings: dict[str, Any]) -> Probe:
    """Run a probe with the options of the command line; print its document if that was asked for."""
    from sinklens.pipeline.options import ProfileOptions

    from .console import ConsoleListener, print_json

    options: ProfileOptions = ProfileOptions(**{key: given[key] for key in OPTIONS if key in given})
    listener = ConsoleListener(quiet=given["quiet"])
    try:
        found: Probe = probe(
            given["model"],
            what,
            options=options,
            out=given["out"] or Path("runs") / run_name(given["model"], name),
            force=given["force"],
            listener=listener,
            argv=sys.argv,
            **settings,
        )
    finally:
        listener.close()
    if given["as_json"]:
        print_json(found.document)
    return found
