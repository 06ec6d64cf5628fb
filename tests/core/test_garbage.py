"""What was there is left alone, what is new is collected, and afterwards all is as before."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from sinklens.core.garbage import new_garbage_only


class Cycle:
    def __init__(self) -> None:
        self.me = self


def dropped() -> weakref.ref[Cycle]:
    return weakref.ref(Cycle())


@pytest.fixture(autouse=True)
def nothing_frozen() -> Iterator[None]:
    gc.unfreeze()
    gc.disable()
    yield
    gc.unfreeze()
    gc.enable()


def test_new_cycles_are_found_and_old_ones_afterwards() -> None:
    old = dropped()
    with new_garbage_only():
        new = dropped()
        gc.collect()
        assert new() is None
        assert old() is not None
    gc.collect()
    assert old() is None


def test_nothing_stays_frozen_after_an_error() -> None:
    with pytest.raises(KeyError), new_garbage_only():
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_the_outer_block_decides() -> None:
    with new_garbage_only():
        with new_garbage_only():
            pass
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_what_the_caller_froze_stays_frozen() -> None:
    gc.freeze()
    with new_garbage_only():
        pass
    assert gc.get_freeze_count() > 0
