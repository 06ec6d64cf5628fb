"""What blocks hand on to later blocks: their state, what else they put out, and what they write for each other.

Most blocks hand on a state and nothing else. Some put out more, which the next one is given (the tokens that an
indexer chose). Some write into a mapping that the model makes for a pass and gives to every block (keys and values
that later blocks read instead of their own). All are found by what blocks are given and put out, not by names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Entries = dict[str, dict[Any, Any]]
Call = Callable[..., Any]


@dataclass(frozen=True)
class Passed:
    """What later blocks may need of the blocks before them.

    Attributes:
        state: What the last of them made of the residual stream.
        others: What else it put out: tensors by their place in its tuple.
        entries: What blocks wrote into the mappings they were given: values by the mapping's argument and by key.
    """

    state: Tensor
    others: Mapping[int, Tensor] = field(default_factory=dict)
    entries: Entries = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds in memory; what tensors share counts once."""
        leaves = (leaf for leaf in tree_leaves((self.state, *self.others.values(), self.entries)))
        stored = (leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor))
        return sum({one.data_ptr(): one.nbytes() for one in stored}.values())

    def copied(self) -> Passed:
        """The same in memory of its own."""

        def clone(leaf: Any) -> Any:
            return leaf.clone() if isinstance(leaf, Tensor) else leaf

        others = {place: one.clone() for place, one in self.others.items()}
        return Passed(self.state.clone(), others, tree_map(clone, self.entries))

    def with_others(self, places: Collection[int] | None) -> Passed:
        """The same with those of `others` that are handed on; all, where that is not known."""
        if places is None:
            return self
        return replace(self, others={place: self.others[place] for place in places if place in self.others})


class Uncarried(Exception):
    """A block wrote something for later ones that is neither tensors nor numbers."""


def put_in(entries: Entries, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give a block what earlier ones wrote for it, where they did not run in this pass."""
    given = mappings(args, kwargs)
    for name, kept in entries.items():
        if name in given:
            given[name].update(kept)


def passing(known: Entries, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Entries]:
    """Run a block: what it puts out, and what it and the blocks before it have written.

    Args:
        known: What those before it wrote; entries that are neither these nor changed are the model's own.

    Raises:
        Uncarried: It wrote what cannot be kept.
    """
    given = mappings(args, kwargs)
    marks = {name: {key: _mark(value) for key, value in one.items()} for name, one in given.items()}
    output = call(*args, **kwargs)
    written = {name: dict(kept) for name, kept in known.items() if name not in given}
    for name, one in given.items():
        before, kept = marks[name], known.get(name, {})
        new = {key: value for key, value in one.items() if key in kept or not _is(before.get(key), value)}
        if not _carried(new):
            raise Uncarried(name)
        if new:
            written[name] = new
    return output, written


def mappings(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, MutableMapping[Any, Any]]:
    """The mutable mappings that a block is given, by name, or by place."""
    named = {**{str(place): value for place, value in enumerate(args)}, **kwargs}
    return {name: value for name, value in named.items() if isinstance(value, MutableMapping)}


def handed_on(others: Mapping[int, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[int]:
    """Which tensors that a block put out the next one is given, whole or as a view."""
    given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    return frozenset(place for place, tensor in others.items() if _storage(tensor) in given)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _mark(value: Any) -> list[tuple[Any, int]]:
    """The leaves of a value as they are now: themselves, and how often each was changed in place."""
    return [(leaf, _version(leaf)) for leaf in tree_leaves(value)]


def _is(mark: list[tuple[Any, int]] | None, value: Any) -> bool:
    """Whether a value is what it was."""
    leaves = tree_leaves(value)
    if mark is None or len(mark) != len(leaves):
        return False
    pairs = zip(mark, leaves, strict=True)
    return all(old is new and version == _version(new) for (old, version), new in pairs)


def _version(leaf: Any) -> int:
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0


def _carried(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_carried, value))
    if type(value) is dict:
        return all(_carried(one) for pair in value.items() for one in pair)
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def same_passed(a: Passed | None, b: Passed | None) -> bool:
    """Equal to the last bit, all of it; NaN equals NaN."""
    if a is None or b is None or a.others.keys() != b.others.keys():
        return False
    if not all(same(x, b.others[place]) for place, x in a.others.items()):
        return False
    return same(a.state, b.state) and _equal(a.entries, b.entries)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and same(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal to the last bit; NaN equals NaN."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())
