"""Python's search for garbage cycles, kept to what is new."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def new_garbage_only() -> Iterator[None]:
    """Objects that are there already are not looked through for the length of the block; new ones are, as always.

    A pass makes objects enough to have everything looked through, and of a process that has imported torch and
    transformers that is a million objects, on one thread, while the others wait. Inside another such block, or where
    the caller has frozen objects himself (`gc.freeze`), this does nothing.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
