"""What does not go with a model that is spread over processes by a tensor-parallel plan."""

from __future__ import annotations

from sinklens.core.errors import UsageError

from .options import ProfileOptions


def refuse_beside_plan(options: ProfileOptions) -> None:
    """Refuse what does not go with a model that is spread over processes.

    Raises:
        UsageError: Another way of placing the model, another library, or an experiment that changes the model.
    """
    given = {
        "--device-map": options.device_map is not None,
        "--device": options.device is not None,
        "--stream on": options.stream == "on",
        "--remote": options.remote,
        f"--backend {options.backend}": options.backend not in (None, "hf"),
        "--images": options.images is not None,
        "--sink-dims": options.sink_dims is not None,
    }
    for flag, used in given.items():
        if used:
            raise UsageError(
                f"{flag} does not go with --tensor-parallel: the plan says what each process holds, and transformers "
                "runs it on prompts of text.",
                hint=f"Leave out either {flag.split()[0]} or --tensor-parallel.",
            )
    for flag, used in {"--verify": options.verify, "--sensitivity": options.sensitivity}.items():
        if used:
            raise UsageError(
                f"{flag} changes parts of the model and needs one process that holds all of them.",
                hint=f"Leave out either {flag} or --tensor-parallel.",
            )


def refuse_one_process(options: ProfileOptions, spread: int | None) -> None:
    """Refuse to spread a model over one process.

    Raises:
        UsageError: With how to start several.
    """
    if options.tensor_parallel and spread is None:
        raise UsageError(
            "--tensor-parallel spreads the model over the processes that torchrun starts, and this is one alone.",
            hint="Start it so: torchrun --nproc-per-node N -m sinklens profile --tensor-parallel ...",
        )
