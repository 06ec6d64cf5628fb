"""The hidden-state seam: plain forward hooks on blocks and their parts.

For pre-norm blocks the residual stream is the block's output. For post-LayerNorm blocks (BERT) the LayerNorm
hides the size of what it normalises, so its *input* is measured instead. The last block is hooked like the
others: `hidden_states[-1]` of transformers is after the final norm and is not used.

What a block adds is held by reference while the block runs, handed over at its end, and let go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sinklens.models.parts import unwrapped
from sinklens.models.spec import Block, Tower
from sinklens.models.sums import states_of

Observer = Callable[[int, Tensor], None]


@dataclass
class BlockPass:
    """One block's run. Tensors are `[batch, pos, dim]` or flat, `[batch * pos, dim]`, and not copies.

    Attributes:
        after: The residual stream after the block.
        before: The block's input; None unless asked for.
        given, made: Inputs and outputs of the parts that were asked for, by module path.
        modules: Those parts, and the ones that compute in between.
    """

    block: Block
    after: Tensor | None = None
    before: Tensor | None = None
    given: dict[str, Tensor] = field(default_factory=dict)
    made: dict[str, Tensor] = field(default_factory=dict)
    modules: Mapping[str, nn.Module] = field(default_factory=dict)


PassObserver = Callable[[BlockPass], None]


@contextmanager
def block_tap(
    model: nn.Module, tower: Tower, observer: PassObserver, *, closely: bool = False
) -> Iterator[None]:
    """`observer(passed)` at the end of each block.

    Args:
        closely: Also hand over the block's input, what its sublayers write (if `Block.sum` knows), and what enters
            and leaves its feed-forward part.
    """
    with ExitStack() as stack:
        for block in tower.blocks:
            watch = _Watch(block, observer)
            stack.callback(watch.let_go)
            watch.attach(model, closely, stack)
        yield


@contextmanager
def input_tap(model: nn.Module, tower: Tower, observer: Observer) -> Iterator[None]:
    """`observer(layer, state)` before each block runs, with the state that enters it.

    What `hidden_states` of transformers lists is not always that: models may add to the state between two blocks.
    """
    with ExitStack() as stack:
        for block in tower.blocks:
            hook = _input_hook(block, observer)
            module = model.get_submodule(block.path)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def residual_tap(model: nn.Module, tower: Tower, observer: Observer) -> Iterator[None]:
    """`observer(layer, state)` for each block, with the residual stream after it `[batch, pos, dim]`."""

    def see(passed: BlockPass) -> None:
        assert passed.after is not None
        observer(passed.block.index, passed.after)

    with block_tap(model, tower, see):
        yield


@contextmanager
def down_proj_tap(model: nn.Module, tower: Tower, observer: Observer) -> Iterator[None]:
    """`observer(layer, output)` for each dense or shared-expert down projection.

    A block with both (none is known) reports the dense one. Outputs may be flat, `[batch * pos, dim]`.
    """
    with ExitStack() as stack:
        for block in tower.blocks:
            path = block.down_proj or block.shared_down_proj
            if path is not None:
                handle = model.get_submodule(path).register_forward_hook(_output_hook(block.index, observer))
                stack.callback(handle.remove)
        yield


def first_of(output: Any) -> Tensor:
    """The tensor of a module's output; some blocks return a tuple, most the tensor itself."""
    return output[0] if isinstance(output, tuple) else output


def _output_hook(layer: int, observer: Observer) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        observer(layer, first_of(output))

    return hook


def _input_hook(block: Block, observer: Observer) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        state = states_of(args, kwargs)
        if state is not None:
            observer(block.index, block.residual(state))

    return hook


class _Watch:
    """The hooks of one block and what they hold while it runs."""

    def __init__(self, block: Block, observer: PassObserver) -> None:
        self.block, self.observer = block, observer
        self.modules: dict[str, nn.Module] = {}
        self.passed = BlockPass(block)

    def let_go(self) -> None:
        self.passed = BlockPass(self.block, modules=self.modules)

    def attach(self, model: nn.Module, closely: bool, stack: ExitStack) -> None:
        block = self.block
        whole = model.get_submodule(block.path)
        if closely:
            before = whole.register_forward_pre_hook(self._begin, with_kwargs=True)
            stack.callback(before.remove)
            self._attach_parts(model, stack)
        if block.residual_norm is not None:
            norm = model.get_submodule(block.residual_norm)
            stack.callback(norm.register_forward_pre_hook(self._normed, with_kwargs=True).remove)
        stack.callback(whole.register_forward_hook(self._end).remove)

    def _attach_parts(self, model: nn.Module, stack: ExitStack) -> None:
        block, total = self.block, self.block.sum
        copied = {write.path: write.copied for write in (*total.attention, *total.mlp)}
        inner = total.feed_forward
        down = block.down_proj or block.shared_down_proj
        makers = [*copied, total.middle, down, block.mlp if block.experts else None]
        for path in dict.fromkeys(path for path in makers if path):
            module = model.get_submodule(path)
            self.modules[path] = unwrapped(module)
            stack.callback(module.register_forward_hook(self._made(path, copied.get(path, False))).remove)
        for path in (inner.act, inner.gate.path if inner.gate else None) if inner else ():
            if path is not None:
                self.modules[path] = unwrapped(model.get_submodule(path))
        for path in dict.fromkeys(path for path in (down, inner.up.path if inner else block.mlp) if path):
            module = model.get_submodule(path)
            self.modules[path] = unwrapped(module)
            stack.callback(module.register_forward_pre_hook(self._given(path), with_kwargs=True).remove)

    def _begin(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.let_go()
        given = states_of(args, kwargs)
        given = None if given is None else self.block.residual(given)
        self.passed.before = given.clone() if given is not None and self.block.sum.input_copied else given

    def _made(self, path: str, copied: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            made = first_of(output)
            self.passed.made[path] = made.clone() if copied else made

        return hook

    def _given(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = states_of(args, kwargs)
            if given is not None:
                self.passed.given[path] = given

        return hook

    def _normed(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.passed.after = states_of(args, kwargs)

    def _end(self, _: nn.Module, args: Any, output: Any) -> None:
        if self.block.residual_norm is None:
            self.passed.after = self.block.residual(first_of(output))
        try:
            if self.passed.after is not None:
                self.observer(self.passed)
        finally:
            self.let_go()
