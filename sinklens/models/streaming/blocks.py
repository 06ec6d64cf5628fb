"""The blocks of a model whose weights stay on disk: loaded when one runs, let go when the next one does.

A *gate* stands before every block. It is a subclass of the block's own class that is put in its place, so that names,
hooks and parts are what they were. In an ordinary pass a gate loads its block, runs it and lets go of it; a *walk*
that is under way decides otherwise (`Walk.at`): that is how many prompts pass through a block while it is there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..spec import Block
from .passed import Entries, Passed
from .recipe import Recipes, put
from .tensors import Spare

BUDGET = 2 * 1024**3
SHELL = "shell"
"""The group of everything outside the blocks."""
_ENTER = "_sinklens_enter"
_walk: ContextVar[Walk | None] = ContextVar("walk", default=None)

Call = Callable[..., Any]


class Walk(Protocol):
    """Decides what happens at the blocks of the passes that run inside `walking`."""

    def at(self, index: int, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A pass has come to block `index`; `call(*args, **kwargs)` runs it."""
        ...


@contextmanager
def walking(walk: Walk) -> Iterator[None]:
    """Passes inside, on this thread, are led by `walk`."""
    token = _walk.set(walk)
    try:
        yield
    finally:
        _walk.reset(token)


@dataclass(frozen=True)
class Sizes:
    """Bytes in memory: of what stays, and of the largest block."""

    shell: int
    block: int


class StreamedBlocks:
    """The blocks of the main tower of a model, on disk.

    Attributes:
        loads: How often each block was loaded.
        form: Values in the tuple that a block puts out; None where it puts out the state alone.
        start: The first block that an interrupted run still needs; 0 in a new one.
        budget: Bytes of states between two blocks that tracing may hold in memory.
        why: Why the model is streamed, in a few words.
    """

    def __init__(
        self, module: nn.Module, blocks: Sequence[Block], recipes: Recipes, device: torch.device
    ) -> None:
        self.module, self.blocks, self.recipes, self.device = module, tuple(blocks), recipes, device
        self.loads = [0] * len(blocks)
        self.form: int | None = None
        self.start = 0
        self.budget, self.why = BUDGET, "asked for"
        self._resident: list[int] = []
        self._ahead: tuple[int, _Reading] | None = None
        self._spare = Spare()
        for block in blocks:
            part = module.get_submodule(block.path)
            part.__dict__[_ENTER] = partial(self.enter, block.index)
            part.__class__ = _gated(type(part))

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def resident(self) -> tuple[int, ...]:
        """The blocks that are in memory."""
        return tuple(sorted(self._resident))

    @property
    def sizes(self) -> Sizes:
        held = sum(p.numel() * p.element_size() for p in self.module.parameters() if not p.is_meta)
        by_block = [self._bytes(index) for index in range(len(self))]
        resident = sum(by_block[index] for index in self._resident)
        return Sizes(held - resident, max(by_block))

    def _bytes(self, index: int) -> int:
        block = self.module.get_submodule(self.blocks[index].path)
        return sum(p.numel() * p.element_size() for p in block.parameters())

    def enter(self, index: int, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the gate of a block does."""
        walk = _walk.get()
        if walk is not None:
            return walk.at(index, call, args, kwargs)
        with self.loaded(index):
            return call(*args, **kwargs)

    def stubbed(self, state: Tensor, others: Mapping[int, Tensor] | None = None) -> Any:
        """A state, and what else there is, as a block of this model hands it on."""
        if self.form is None:
            return state
        return (state, *((others or {}).get(place) for place in range(1, self.form)))

    def ran(self, output: Any, entries: Entries | None = None) -> Passed:
        """What a block hands on, by what it has put out; in what form is remembered.

        Args:
            entries: What it and blocks before it wrote for later ones.
        """
        self.form = len(output) if isinstance(output, tuple) else None
        if not isinstance(output, tuple):
            return Passed(output, {}, entries or {})
        others = {place: one for place, one in enumerate(output) if place and isinstance(one, Tensor)}
        return Passed(output[0], others, entries or {})

    @contextmanager
    def loaded(self, index: int) -> Iterator[None]:
        """A block with its weights; meanwhile the next one is read. Afterwards it is let go."""
        self.load(index)
        self.read_ahead(index + 1)
        try:
            yield
        finally:
            self.free(index)

    def load(self, index: int) -> None:
        """Give a block its weights.

        Raises:
            ModelError: A file or tensor cannot be used; it is named.
        """
        if index in self._resident:
            return
        ahead, self._ahead = self._ahead, None
        values = ahead[1].result() if ahead is not None and ahead[0] == index else None
        if values is None:
            if ahead is not None:
                ahead[1].join()  # a block that nobody came to: two at a time are in memory, not three
            values = self._made(index)
        put(self.module, values)
        self._resident.append(index)
        self.loads[index] += 1

    def free(self, index: int) -> None:
        """Take its weights from a block."""
        if index not in self._resident:
            return
        self._resident.remove(index)
        for module in self.module.get_submodule(self.blocks[index].path).modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if self.device.type == "cpu":
                        self._spare.put(parameter)
                    empty = torch.empty_like(parameter, device="meta")
                    module._parameters[name] = nn.Parameter(empty, requires_grad=False)

    def read_ahead(self, index: int) -> None:
        """Begin to read a block that comes next, beside whatever runs."""
        if index >= len(self) or index in self._resident or self._ahead is not None:
            return
        reading = _Reading(partial(self._made, index))
        self._ahead = (index, reading)
        reading.start()

    def close(self) -> None:
        """Let go of every block and of what was read ahead; the next block that runs is loaded again."""
        self.keep_only(())

    def keep_only(self, indices: Sequence[int]) -> None:
        """Let go of all blocks but these, and of what was read ahead."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead[1].join()
        for index in [index for index in self._resident if index not in indices]:
            self.free(index)
        self._spare.clear()

    def _made(self, index: int) -> dict[str, Tensor]:
        values = self.recipes.make(index, self._spare)
        self._spare.settle()
        if self.device.type == "cpu":
            return values
        return {name: value.to(self.device) for name, value in values.items()}


class _Reading(threading.Thread):
    """Reads a block on a thread of its own. A daemon: it only reads, and must not keep a program from ending."""

    def __init__(self, make: Callable[[], dict[str, Tensor]]) -> None:
        super().__init__(name="sinklens-read", daemon=True)
        self._make = make
        self._made: dict[str, Tensor] | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._made = self._make()
        except BaseException as error:  # told to whoever wants the block
            self._error = error

    def result(self) -> dict[str, Tensor] | None:
        self.join()
        made, self._made = self._made, None
        if self._error is not None:
            raise self._error
        return made


@cache
def _gated(own: type[nn.Module]) -> type[nn.Module]:
    """A class that is `own` in everything but that its instances ask before they run."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_ENTER](partial(own.__call__, self), args, kwargs)

    names = {"__call__": call, "__module__": own.__module__, "__qualname__": own.__qualname__}
    return type(own.__name__, (own,), names)
