"""A streamed model with a few of its blocks, for questions that need many short passes: the others are skipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..spec import Anatomy, Sum
from ..sums import states_of
from .blocks import Call, StreamedBlocks, walking
from .passed import handed_on


class _Sample:
    """A pass through some blocks only: the others hand on what they are given.

    Attributes:
        stuck: The block that could not run, and why: mostly for want of what a skipped one writes for it.
    """

    def __init__(self, blocks: StreamedBlocks, chosen: Sequence[int]) -> None:
        self.blocks, self.chosen = blocks, frozenset(chosen)
        self.stuck: tuple[int, str] | None = None
        self._others: Mapping[int, Tensor] = {}

    def at(self, index: int, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if index in self.chosen:
            try:
                output = call(*args, **kwargs)
            except Exception as error:
                self.stuck = (index, repr(error))
                raise
            self._others = self.blocks.ran(output).others
            return output
        given = states_of(args, kwargs)
        assert given is not None
        handed = handed_on(self._others, args, kwargs)
        return self.blocks.stubbed(given, {place: self._others[place] for place in handed})


@contextmanager
def sampled(
    blocks: StreamedBlocks, anatomy: Anatomy, chosen: Sequence[int] | None = None
) -> Iterator[Anatomy]:
    """The model with a few of its blocks; the others are skipped.

    The chosen ones stay in memory, so that those which are needed next need not be read again. Blocks that write what
    a chosen one reads are chosen, too.

    Args:
        chosen: By default the first two that are needed. The very first must be among them, unless a run goes on:
            it tells how blocks hand on their state.

    Yields:
        The anatomy of what is left, its blocks numbered anew.
    """
    tower = anatomy.main
    chosen = _complete(blocks, first_two(blocks) if chosen is None else chosen)
    kept = tuple(replace(tower.blocks[index], index=place, sum=Sum()) for place, index in enumerate(chosen))
    alone = replace(tower, blocks=kept)
    _load(blocks, chosen)
    with walking(_Sample(blocks, chosen)):
        yield replace(anatomy, towers=tuple(alone if one is tower else one for one in anatomy.towers))


def first_two(blocks: StreamedBlocks) -> tuple[int, ...]:
    """The first two blocks that are needed."""
    return tuple(range(blocks.start, len(blocks)))[:2]


def samples(blocks: StreamedBlocks) -> list[tuple[int, ...]]:
    """Pairs of blocks in which every kind that is needed is found, the first two last.

    Blocks are of one kind if they have the same class, parts of the same shapes, and the same kind of attention.
    """
    config: Any = getattr(blocks.module, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    types = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or []
    first: dict[Any, int] = {}
    for block in blocks.blocks[blocks.start :]:
        part = blocks.module.get_submodule(block.path)
        shapes = tuple((name, tuple(p.shape)) for name, p in part.named_parameters())
        kind = types[block.index] if block.index < len(types) else None
        first.setdefault((type(part), shapes, kind), block.index)
    pair = first_two(blocks)
    return [*((pair[0], index) for index in first.values() if index > pair[-1]), pair]


def _complete(blocks: StreamedBlocks, chosen: Sequence[int]) -> tuple[int, ...]:
    """The chosen blocks and those that write what they read, found by running: the nearest ones before them.

    With one of those, the first of all is not needed any more.
    """
    found = tuple(sorted(chosen))
    stuck = _stuck(blocks, found)
    while stuck is not None:
        for index in reversed([index for index in range(stuck[0]) if index not in found]):
            more = tuple(sorted((*found, index)))
            now = _stuck(blocks, more)
            if now is None or now[0] > stuck[0] or (now[0] == stuck[0] and now[1] != stuck[1]):
                found, stuck = more, now
                break
        else:
            return tuple(sorted(chosen))  # whoever runs it is told what it lacks
    if len(found) > len(chosen) and _stuck(blocks, found[1:]) is None:
        return found[1:]
    return found


def _stuck(blocks: StreamedBlocks, chosen: Sequence[int]) -> tuple[int, str] | None:
    """Which of these blocks cannot run if all others are skipped, and why; None if all can."""
    _load(blocks, chosen)
    sample = _Sample(blocks, chosen)
    ids = torch.arange(4, device=blocks.device)[None]
    with walking(sample), torch.no_grad():
        try:
            blocks.module(input_ids=ids, use_cache=False)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception:  # what has nothing to do with blocks is told by whoever runs the model in earnest
            return sample.stuck
    return None


def _load(blocks: StreamedBlocks, chosen: Sequence[int]) -> None:
    blocks.keep_only(chosen)
    for index in chosen:
        blocks.load(index)
