"""Numbers of things in sentences: one prompt is not "1 prompts"."""

from __future__ import annotations

from typing import Any


def counted(n: Any, noun: str, plural: str | None = None) -> str:
    """A number with its noun.

    >>> counted(1, "prompt"), counted(3, "other position"), counted(0, "entry", "entries")
    ('1 prompt', '3 other positions', '0 entries')
    """
    return f"{n} {noun if n == 1 else plural or noun + 's'}"


def verb(n: Any, one: str, many: str) -> str:
    """The form of a verb (or of "it", "its") that goes with a number.

    >>> verb(1, "was", "were"), verb(2, "was", "were")
    ('was', 'were')
    """
    return one if n == 1 else many
