"""Passes that stop at a block: one that begins again for every block, and one that waits before each.

*Replay*: the model's own forward pass, begun anew for one block. Earlier blocks hand on what they are given, the last
of them hands on what was kept, the block itself runs among what earlier ones wrote for it, and the pass ends there.
Whatever the model does before, between and around its blocks (embedding, masks, rotary angles, pictures added between
blocks) it does itself.

*Ordinary pass*: the same forward pass from beginning to end, on a thread that waits before each block until that block
is in memory. It is what replays are held against.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sinklens.core.errors import ModelError
from sinklens.models.spec import Anatomy
from sinklens.models.streaming import StreamedBlocks, walking
from sinklens.models.streaming.passed import Passed, handed_on, passing, put_in
from sinklens.models.sums import states_of

Call = Callable[..., Any]
Run = Callable[[], Any]


class _Reached(Exception):
    """The block has run; nothing else of the pass is needed."""


class Replay:
    """A pass that runs one block.

    Args:
        passed: What the blocks before it handed on; None for the first.

    Attributes:
        entering, left: The state before the block, and what it hands on, once it ran.
    """

    def __init__(
        self, blocks: StreamedBlocks, index: int, passed: Passed | None, *, copied: bool = False
    ) -> None:
        self.blocks, self.index, self.passed, self.copied = blocks, index, passed, copied
        self.entering: Tensor | None = None
        self.left: Passed | None = None

    def at(self, index: int, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = states_of(args, kwargs)
        assert given is not None
        if index < self.index:
            return _skipped(self.blocks, given, self.passed if index == self.index - 1 else None)
        self.entering = given.clone() if self.copied else given
        known = self.passed.entries if self.passed else {}
        put_in(known, args, kwargs)
        output, entries = passing(known, call, args, kwargs)
        self.left = self.blocks.ran(output, entries)
        raise _Reached

    def run(self, forward: Run) -> Passed:
        """What the block hands on.

        Raises:
            ModelError: The pass never came to it.
        """
        with walking(self), suppress(_Reached):
            forward()
        if self.left is None:
            raise ModelError(
                f"A pass of {type(self.blocks.module).__name__} ended before block {self.index}.",
                hint="This model cannot be streamed; use --stream off.",
            )
        return self.left


class OrdinaryPass:
    """A forward pass on its own thread that waits before each block.

    It and whoever leads it never run at the same time.

    Args:
        start, passed: Of a pass that begins in the middle: the first block that runs, and what those before it
            handed on.
    """

    def __init__(
        self, blocks: StreamedBlocks, forward: Run, start: int = 0, passed: Passed | None = None
    ) -> None:
        self.blocks, self.forward, self.start = blocks, forward, start
        self.passed = (
            passed and passed.copied()
        )  # replays are given the same, and blocks may change it in place
        self._arrived, self._go = threading.Semaphore(0), threading.Semaphore(0)
        self._entering: Tensor | None = None
        self._left: Passed | None = None
        self._place = -1
        self._ended = False
        self._error: BaseException | None = None
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=lambda: context.run(self._run), name="sinklens-ordinary-pass", daemon=True
        )

    def advance(self, index: int) -> tuple[Tensor, Passed]:
        """Let it pass through block `index`, which is in memory: the state before, and what the block hands on.

        Raises:
            ModelError: It came to another block.
        """
        if self._thread.ident is None:
            self._thread.start()
            self._wait()
        entering, place = self._entering, self._place
        if place == index:
            self._go.release()
            self._wait()
        if entering is None or self._left is None or place != index:
            raise ModelError(
                f"{type(self.blocks.module).__name__} does not run its blocks once each and in order.",
                detail=f"Block {index} was expected; the pass was at {place}.",
                hint="This model cannot be streamed; use --stream off.",
            )
        return entering, self._left

    def stop(self) -> None:
        """End it where it is."""
        if self._thread.ident is not None and not self._ended:
            self._ended = True
            self._go.release()
            self._thread.join()

    def _wait(self) -> None:
        self._arrived.acquire()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with walking(self), suppress(_Reached):
                self.forward()
        except BaseException as error:  # raised again where somebody waits
            self._error = error
        self._ended = True
        self._arrived.release()

    def at(self, index: int, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = states_of(args, kwargs)
        assert given is not None
        if index < self.start:
            return _skipped(self.blocks, given, self.passed if index == self.start - 1 else None)
        if self._left is not None:
            self._left = self._left.with_others(handed_on(self._left.others, args, kwargs))
        self._entering, self._place = given.clone(), index
        self._arrived.release()
        self._go.acquire()
        if self._ended:
            raise _Reached
        if self.passed is not None and index == self.start:
            put_in(self.passed.entries, args, kwargs)
        before = self.passed if index == self.start else self._left
        output, entries = passing(before.entries if before else {}, call, args, kwargs)
        left = self.blocks.ran(output, entries)
        self._left = replace(left, state=left.state.clone())
        if index == len(self.blocks) - 1:
            self._left = self._left.with_others(())
            raise _Reached
        return output


def _skipped(blocks: StreamedBlocks, given: Tensor, passed: Passed | None) -> Any:
    """What a block that does not run hands on: what it was given, or, the last of them, what was kept."""
    if passed is None:
        return blocks.stubbed(given)
    return blocks.stubbed(passed.state, passed.others)


class Remembered:
    """What the other towers of a model gave in a batch's first pass, given again in its replays.

    Without it, a vision tower would read the same pictures once for every block.
    """

    def __init__(self, module: nn.Module, anatomy: Anatomy) -> None:
        self.modules = other_towers(module, anatomy)
        self._given: dict[int, list[Any]] = {}

    @property
    def nbytes(self) -> int:
        from torch.utils._pytree import tree_leaves

        leaves = (leaf for outputs in self._given.values() for leaf in tree_leaves(outputs))
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))

    def forget(self) -> None:
        """Let go of it; the next pass runs the towers again."""
        self._given.clear()

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Inside, passes of the batch run the other towers once and never again."""
        known = bool(self._given)
        with ExitStack() as stack:
            for module in self.modules:
                outputs = iter(self._given.get(id(module), ())) if known else None
                stack.enter_context(self._replaced(module, outputs))
            yield

    @contextmanager
    def _replaced(self, module: nn.Module, outputs: Iterator[Any] | None) -> Iterator[None]:
        own = module.forward

        def first(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            self._given.setdefault(id(module), []).append(_copied(output))
            return output

        def again(*args: Any, **kwargs: Any) -> Any:
            assert outputs is not None
            return _copied(next(outputs))

        before = module.__dict__.get("forward")
        module.__dict__["forward"] = first if outputs is None else again
        try:
            yield
        finally:
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before


def _copied(output: Any) -> Any:
    """The same with its tensors copied, so that what a model does to them in place stays with one pass."""
    from torch.utils._pytree import tree_map

    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, output)


def other_towers(module: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    """The largest module around each tower but the main one that holds no block of the main one."""
    main = anatomy.main.blocks[0].path
    found: dict[str, None] = {}
    for tower in anatomy.towers:
        path = tower.blocks[0].path.rpartition(".")[0]
        while (above := path.rpartition(".")[0]) and not main.startswith(f"{above}."):
            path = above
        if tower is not anatomy.main and not main.startswith(f"{path}."):
            found[path] = None
    return [module.get_submodule(path) for path in found]
