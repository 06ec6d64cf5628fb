"""`sinklens testbed`: models of which the truth is known."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .environment import quiet_libraries

app = typer.Typer(no_args_is_help=True, help="Models of which the truth is known: list, train or plant them.")

Out = Annotated[Path | None, typer.Option(help="Folder to write. [default: testbeds/NAME-SEED]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list", help="List the testbeds: what emerged in training, and what can be planted.")
def list_command(as_json: AsJson = False) -> None:
    from sinklens.testbeds import list_testbeds

    rows = [
        {"name": bed.name, "kind": bed.kind, "bundled": "bundled" if bed.path else "", "about": bed.about}
        for bed in list_testbeds()
    ]
    if as_json:
        from .console import print_json

        print_json({"testbeds": rows})
        return
    widths = {key: max(len(row[key]) for row in rows) for key in rows[0]}
    for row in rows:
        print("  ".join(f"{value:<{widths[key]}}" for key, value in row.items()).rstrip())


@app.command("train", help="Train a testbed from scratch on the CPU; the same seed gives the same weights.")
def train_command(
    name: Annotated[str, typer.Argument(help="A trained testbed of `sinklens testbed list`.")],
    seed: Annotated[int | None, typer.Option(help="Seed. [default: the recipe's own, as bundled]")] = None,
    out: Out = None,
    steps: Annotated[
        str,
        typer.Option(help="Also save after these steps, comma-separated: training dynamics for `compare`."),
    ] = "",
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress on stderr.")] = False,
) -> None:
    from sinklens.testbeds import train_testbed

    quiet_libraries()
    name = full_name(name)
    folder = writable(out or Path("testbeds") / f"{name}-{'own' if seed is None else seed}")

    def show(step: int, total: int, loss: float) -> None:
        if not quiet and (step % 100 == 0 or step == total):
            print(f"step {step}/{total}  loss {loss:.3f}", file=sys.stderr, flush=True)

    print(train_testbed(name, folder, seed=seed, steps=_numbers(steps), on_step=show))


@app.command("plant", help="Save a tiny random model with planted sinks, and truth.json, the answer key.")
def plant_command(
    family: Annotated[
        str,
        typer.Argument(
            help="llama, qwen3_moe, mistral, gpt2, gemma2, ..., or retrieval-first, retrieval-inner, "
            "retrieval-visual: a task that a sink stands in the way of, with questions (task.jsonl)."
        ),
    ],
    seed: Annotated[int, typer.Option(help="Draws the weights and the places.")] = 0,
    strength: Annotated[
        float | None,
        typer.Option(
            help="Logit of the sink over all other keys, nats. [default: 40; retrieval: 8, visual 2.74]"
        ),
    ] = None,
    noise: Annotated[float | None, typer.Option(help="Noise on the planted logits, nats.")] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    from sinklens.testbeds import plant_testbed

    from .console import print_json

    quiet_libraries()
    family = family.removeprefix("planted-")
    folder = writable(out or Path("testbeds") / f"planted-{family}-{seed}")
    truth = plant_testbed(family, folder, seed=seed, strength=strength, noise=noise)
    if as_json:
        print_json(truth.to_json())
    else:
        print(folder)


def full_name(name: str) -> str:
    """`dense` for `dense-ind`: the one trained testbed whose name begins so."""
    from sinklens.testbeds import list_testbeds

    longer = [
        bed.name for bed in list_testbeds() if bed.kind == "trained" and bed.name.startswith(f"{name}-")
    ]
    return longer[0] if len(longer) == 1 else name


def writable(folder: Path) -> Path:
    """The folder, if something can be written there.

    Raises:
        UsageError: It cannot be written, or holds a model already.
    """
    from sinklens.core.errors import UsageError

    if (folder / "config.json").exists():
        raise UsageError(f"{folder} holds a model already.", hint="Choose another folder with --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"The folder {folder} cannot be written: {error.strerror}.", hint="Choose another with --out."
        ) from error
    return folder


def _numbers(text: str) -> list[int]:
    from sinklens.core.errors import UsageError

    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"--steps takes numbers separated by commas, got {text!r}.") from None
