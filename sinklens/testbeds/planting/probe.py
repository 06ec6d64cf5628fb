"""Looks inside a forward pass and stops it as soon as the wanted module has run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from jaxtyping import Int
from torch import Tensor, nn

from ..blocks import trunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ids: TypeAlias = Int[Tensor, "prompt position"]


class _Stop(Exception):
    """Carries nothing: the hook has kept what it came for."""


def outputs_of(model: PreTrainedModel, module: nn.Module, ids: Ids) -> Any:
    """What `module` returns in a forward pass."""
    return _capture(model, module, ids)[1]


def inputs_of(model: PreTrainedModel, module: nn.Module, ids: Ids) -> tuple[Any, ...]:
    """The positional arguments `module` is called with."""
    return _capture(model, module, ids)[0]


def _capture(model: PreTrainedModel, module: nn.Module, ids: Ids) -> tuple[tuple[Any, ...], Any]:
    kept: list[tuple[tuple[Any, ...], Any]] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kept.append((args, output))
        raise _Stop

    handle = module.register_forward_hook(hook)
    try:
        trunk(model)(input_ids=ids, use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    return kept[0]


@contextmanager
def evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode inside the `with`, the former mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """Eager attention inside the `with`: the kernel that can return its weights."""
    before = model.config._attn_implementation or "eager"
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
