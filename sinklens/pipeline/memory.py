"""What is said when memory runs out: where, and what would take less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sinklens.core.errors import OutOfMemory, SinklensError

from .options import ProfileOptions
from .streamed_blocks import refuse_streaming

STREAMING = "--stream on, which reads the model's blocks from disk one at a time"


@contextmanager
def memory_told(during: str, model: Any, options: ProfileOptions, *, streams: bool) -> Iterator[None]:
    """Whatever runs out of memory inside ends in words, with streaming named where it would help.

    Args:
        during: What is done inside, as in "while ...".
        model: As it was given, by name or in memory.
        streams: Whether blocks may stay on disk here and do not yet.

    Raises:
        OutOfMemory: In place of what torch or Python raise, or as it was raised, with the hint.
    """
    try:
        yield
    except OutOfMemory as error:
        if not (streams and can_stream(model, options)):
            raise
        hint = f"{error.hint}, or {STREAMING}" if error.hint else f"Try: {STREAMING}"
        raise OutOfMemory(error.what, detail=error.detail, hint=hint) from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        also = f", or {STREAMING}" if streams and can_stream(model, options) else ""
        raise OutOfMemory(
            f"Out of memory while {during}.",
            hint=f"Try: a smaller --seq-len, or --device-map auto{also}",
        ) from error


def can_stream(model: Any, options: ProfileOptions) -> bool:
    """Whether the model could be read block by block."""
    try:
        refuse_streaming(model, options)
    except SinklensError:
        return False
    return True
