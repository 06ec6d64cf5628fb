"""A table of named things (analyzers, mitigations) filled by decorators, with helpful answers to misses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, cast

from .errors import UsageError
from .suggest import did_you_mean

T = TypeVar("T")
S = TypeVar("S")


class Registry(Generic[T]):
    """Names to classes. `kind` is the word used in messages, `listing` the command that lists the names."""

    def __init__(self, kind: str, listing: str) -> None:
        self.kind, self.listing = kind, listing
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[S], S]:
        """Decorator that adds an item and returns it as it is, with its own type."""

        def add(item: S) -> S:
            if name in self._items:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._items[name] = cast(T, item)
            return item

        return add

    def __getitem__(self, name: str) -> T:
        try:
            return self._items[name]
        except KeyError:
            raise UsageError(
                f"Unknown {self.kind} {name!r}.",
                detail=did_you_mean(name, self._items),
                hint=f"See: {self.listing}",
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def items(self) -> Iterator[tuple[str, T]]:
        return iter(self._items.items())
