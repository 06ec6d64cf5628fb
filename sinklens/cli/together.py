"""A command that torchrun started several times at once: one of them talks, and its error is told once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from sinklens.tracers.team import Team

TOGETHER = ("profile",)
"""Commands that several processes can do together."""


def several() -> bool:
    """Whether this process is one of several."""
    # As in tracers/team.py, which costs the import of torch.
    return int(os.environ.get("WORLD_SIZE") or 1) > 1 and {"RANK", "MASTER_ADDR"} <= os.environ.keys()


def alone(arguments: list[str]) -> None:
    """Refuse a command that only one process can do; asking for help is no command.

    Raises:
        UsageError: In the first process; the others leave without a word.
    """
    from sinklens.core.errors import UsageError

    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    if command is None or command in TOGETHER or not several():
        return
    if os.environ["RANK"] != "0":
        raise typer.Exit(UsageError.exit_code)
    raise UsageError(
        f"`sinklens {command}` runs in one process; torchrun started {os.environ['WORLD_SIZE']}.",
        detail=f"Several processes can do: {', '.join(TOGETHER)}.",
        hint=f"Start it without torchrun: sinklens {' '.join(arguments)}",
    )


@contextmanager
def one_voice(*, on_devices: bool = False) -> Iterator[Team]:
    """The team of this process; of several that fail, the first one's error passes and the others leave silently.

    Args:
        on_devices: As in `joined`.

    Raises:
        typer.Exit: In place of an error that another process tells.
    """
    from sinklens.core.errors import InterruptedRun, SinklensError
    from sinklens.tracers.team import Elsewhere, joined

    with joined(on_devices=on_devices) as team:
        try:
            yield team
        except (Exception, KeyboardInterrupt) as error:
            code = error.exit_code if isinstance(error, SinklensError) else 1
            code = InterruptedRun.exit_code if isinstance(error, KeyboardInterrupt) else code
            if isinstance(error, Elsewhere) or not team.speaks():
                raise typer.Exit(code) from None
            raise
