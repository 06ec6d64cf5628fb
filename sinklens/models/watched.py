"""One forward pass of a model, watched: which block ran when, and what its parts were given and made."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .parts import is_norm
from .spec import Anatomy, Block

FEEDERS = ("down_proj", "shared_down_proj", "experts")
"""Parts of a block that write what its feed-forward part adds."""


@dataclass
class Seen:
    """One forward pass: which block ran when, what went in and out, and the tensors' identities.

    `values` are copies, because some models add in place; `tensors` are kept so that no address is used twice.
    """

    order: list[str] = field(default_factory=list)
    values: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    identities: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    tensors: list[Any] = field(default_factory=list)


def first_of(value: Any) -> Any:
    """What a module made: the first of several."""
    return value[0] if isinstance(value, tuple) else value


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The states a module is given: the first tensor by position, `hidden_states`, or the first by name."""
    named = [kwargs.get("hidden_states"), *kwargs.values()]
    return next((value for value in [*args, *named] if isinstance(value, Tensor)), None)


def _identity(value: Any) -> Any:
    return (value.data_ptr(), value.numel()) if isinstance(value, Tensor) else None


def norms_of(model: nn.Module, block: Block) -> list[str]:
    """Norms of a block outside its attention (query and key norms have no role in the residual stream)."""
    found = [
        f"{block.path}.{name}"
        for name, part in model.get_submodule(block.path).named_modules()
        if is_norm(part)
    ]
    return [name for name in found if not (block.attention and name.startswith(f"{block.attention}."))]


def feed_forward_of(model: nn.Module, block: Block) -> list[str]:
    """Modules whose input is the feed-forward input: the module, or the maps of blocks that have none."""
    if block.mlp:
        return [block.mlp]
    own = (block.attention or "", block.attention_output or "", block.down_proj or "")
    names = (f"{block.path}.{name}" for name, _ in model.get_submodule(block.path).named_modules() if name)
    return [
        name
        for name in names
        if hasattr(model.get_submodule(name), "in_features")
        and not any(name == part or (part and name.startswith(f"{part}.")) for part in own)
    ]


def observe(model: nn.Module, anatomy: Anatomy, run: Callable[[], Any]) -> Seen:
    """One pass, watching blocks (values and order) and their parts (identities)."""
    seen = Seen()
    watched: dict[str, None] = {}
    blocks = {block.path for tower in anatomy.towers for block in tower.blocks}
    for tower in anatomy.towers:
        for block in tower.blocks:
            parts = [block.path, block.attention, *(getattr(block, role) for role in FEEDERS)]
            parts += feed_forward_of(model, block)
            watched.update(dict.fromkeys(part for part in [*parts, *norms_of(model, block)] if part))
    roles = ("path", "attention", "residual_norm", *FEEDERS)
    kept = {getattr(block, role) for tower in anatomy.towers for block in tower.blocks for role in roles}

    def watch(name: str) -> Callable[..., None]:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            given = input_of(args, kwargs)
            if name in kept and given is not None:
                seen.values[name] = (given.clone(), given)
            seen.identities[name] = (_identity(given), None)
            seen.tensors.append(given)

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            made = first_of(output)
            if name in blocks:
                seen.order.append(name)
            if name in kept and isinstance(made, Tensor):
                seen.values[name] = (seen.values.get(name, (made,))[0], made.clone())
            seen.identities[name] = (seen.identities[name][0], _identity(made))
            seen.tensors.append(made)

        module = model.get_submodule(name)
        stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        return after

    with ExitStack() as stack:
        for name in watched:
            watch(name)
        run()
    return seen
