"""Passes that stop at a block: one that begins again for every block, and one that waits before each.

*Replay*: the model's own forward pass, begun anew for one block. Earlier blocks hand on what they are given, the last
of them hands on the state that was kept, the block itself runs, and the pass ends there. Whatever the model does
before, between and around its blocks (embedding, masks, rotary angles, pictures added between blocks) it does itself.

*Ordinary pass*: the same forward pass from beginning to end, on a thread that waits before each block until that block
is in memory. It is what replays are held against.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from sinklens.core.errors import ModelError
from sinklens.models.spec import Anatomy
from sinklens.models.streaming import StreamedBlocks, walking
from sinklens.models.sums import states_of

Call = Callable[..., Any]
Run = Callable[[], Any]


class _Reached(Exception):
    """The block has run; nothing else of the pass is needed."""


class Replay:
    """A pass that runs one block.

    Attributes:
        entering, left: The state before and after the block, once it ran.
    """

    def __init__(
        self, blocks: StreamedBlocks, index: int, state: Tensor | None, *, copied: bool = False
    ) -> None:
        self.blocks, self.index, self.state, self.copied = blocks, index, state, copied
        self.entering: Tensor | None = None
        self.left: Tensor | None = None

    def at(self, index: int, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = states_of(args, kwargs)
        assert given is not None
        if index < self.index:
            kept = self.state if index == self.index - 1 else given
            assert kept is not None
            return self.blocks.stubbed(kept)
        self.entering = given.clone() if self.copied else given
        self.left = self.blocks.ran(call(*args, **kwargs))
        raise _Reached

    def run(self, forward: Run) -> Tensor:
        """The state after the block.

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
        start, state: Of a pass that begins in the middle: the first block that runs, and the state before it.
    """

    def __init__(
        self, blocks: StreamedBlocks, forward: Run, start: int = 0, state: Tensor | None = None
    ) -> None:
        self.blocks, self.forward, self.start, self.state = blocks, forward, start, state
        self._arrived, self._go = threading.Semaphore(0), threading.Semaphore(0)
        self._entering: Tensor | None = None
        self._left: Tensor | None = None
        self._place = -1
        self._ended = False
        self._error: BaseException | None = None
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=lambda: context.run(self._run), name="sinklens-ordinary-pass", daemon=True
        )

    def advance(self, index: int) -> tuple[Tensor, Tensor]:
        """Let it pass through block `index`, which is in memory: the states before and after.

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
            kept = self.state if index == self.start - 1 else given
            assert kept is not None
            return self.blocks.stubbed(kept)
        self._entering, self._place = given.clone(), index
        self._arrived.release()
        self._go.acquire()
        if self._ended:
            raise _Reached
        output = call(*args, **kwargs)
        self._left = self.blocks.ran(output).clone()
        if index == len(self.blocks) - 1:
            raise _Reached
        return output


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal to the last bit; NaN equals NaN."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


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
