"""The errors users meet. Each says what happened, what was expected and found, and what to type next.

The exit code belongs to the class, so that the command line has no table of its own.
"""

from __future__ import annotations

from typing import ClassVar


class SinklensError(Exception):
    """Base of all errors a user can cause or meet.

    Args:
        what: One sentence: the thing and what is wrong with it.
        detail: What was expected and what was found, if `what` does not say it.
        hint: The next command or change to try.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, detail: str | None = None, hint: str | None = None) -> None:
        self.what, self.detail, self.hint = what, detail, hint
        super().__init__("\n".join(part for part in (what, detail, hint) if part))


class UsageError(SinklensError):
    """The command or call is wrong: an unknown analyzer, a bad option value."""

    exit_code = 2


class ModelError(SinklensError):
    """The model cannot be used: not found, damaged, of an unsupported family."""

    exit_code = 3


class DataError(SinklensError):
    """The inputs cannot be used: an empty file, a missing field, a prompt too short."""

    exit_code = 3


class ResourceError(SinklensError):
    """Memory or disk ran out. What was finished is kept."""

    exit_code = 4


class OutOfMemory(ResourceError):
    """Memory ran out while a model was opened or run."""


class SelfCheckError(SinklensError):
    """A check on the measurement itself failed, so there is no verdict."""

    exit_code = 5


class GateError(SinklensError):
    """A `--fail-if` condition held."""

    exit_code = 6


class InterruptedRun(SinklensError):
    """The user stopped the run. What was finished is kept."""

    exit_code = 130
