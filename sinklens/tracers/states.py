"""The hidden-state seam: plain forward hooks on blocks and down projections.

For pre-norm blocks the residual stream is the block's output. For post-LayerNorm blocks (BERT) the LayerNorm
hides the size of what it normalises, so its *input* is measured instead. The last block is hooked like the
others: `hidden_states[-1]` of transformers is after the final norm and is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from sinklens.models.spec import Tower

Observer = Callable[[int, Tensor], None]


@contextmanager
def residual_tap(model: nn.Module, tower: Tower, observer: Observer) -> Iterator[None]:
    """`observer(layer, state)` for each block, with the residual stream after it `[batch, pos, dim]`."""
    with ExitStack() as stack:
        for block in tower.blocks:
            if block.residual_norm is None:
                hook = _output_hook(block.index, observer)
                handle = model.get_submodule(block.path).register_forward_hook(hook)
            else:
                hook = _input_hook(block.index, observer)
                handle = model.get_submodule(block.residual_norm).register_forward_pre_hook(hook)
            stack.callback(handle.remove)
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


def _input_hook(layer: int, observer: Observer) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any) -> None:
        observer(layer, args[0])

    return hook
