"""What changes a model right now, said by whoever put it on, so that whatever is recorded meanwhile can say it too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from sinklens.models.spec import Tower

# By id of a block: a model may be wrapped, or a part of it be run, and the blocks stay the same objects.
_on: dict[int, list[dict[str, Any]]] = {}


@contextmanager
def announced(model: nn.Module, tower: Tower, what: dict[str, Any]) -> Iterator[None]:
    """Say for the length of a `with` that a tower is changed.

    Args:
        what: Plain data: `name` and `parameters`.
    """
    with ExitStack() as stack:
        for block in tower.blocks:
            key = id(model.get_submodule(block.path))
            _on.setdefault(key, []).append(what)
            stack.callback(_forget, key, what)
        yield


def announced_on(model: nn.Module, tower: Tower) -> list[dict[str, Any]]:
    """What changes any block of a tower, in the order in which it was put on."""
    found = [what for block in tower.blocks for what in _on.get(id(model.get_submodule(block.path)), ())]
    return list({id(what): what for what in found}.values())


def _forget(key: int, what: dict[str, Any]) -> None:
    _on[key] = [other for other in _on[key] if other is not what]
    if not _on[key]:
        del _on[key]
