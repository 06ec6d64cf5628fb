"""Inputs that are made again when they are needed, so that many pictures do not fill the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

HELD = 1 << 30
"""Bytes of pixels that a set of prompts keeps; those of later prompts are made again for each pass."""


class Store:
    """What the prompts of a set keep: some inputs for good, and the last ones that were made again."""

    def __init__(self, budget: int = HELD) -> None:
        self.left = budget
        self.last: tuple[Again | None, Mapping[str, Any]] = (None, {})

    def keep(self, features: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """The inputs themselves while there is room, else what makes them again."""
        size = sum(value.nbytes for value in features.values())
        if size <= self.left:
            self.left -= size
            return features
        self.left = 0
        return Again(self, tuple(features), make)


class Again(Mapping[str, Any]):
    """A mapping whose values are computed when one of them is asked for, and let go when another prompt's are."""

    def __init__(self, store: Store, names: tuple[str, ...], make: Callable[[], Mapping[str, Any]]) -> None:
        self._store, self._names, self._make = store, names, make

    def __getitem__(self, name: str) -> Any:
        if self._store.last[0] is not self:
            self._store.last = (self, self._make())
        return self._store.last[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
